"""`seal evidence` for GPUs and switches: what the command does when REPORT is their evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from appliance.output import print_json
from attestation.endorsements.sources import read_bounded
from attestation.errors import MalformedProfile
from attestation.evidence.gpu.kinds import is_gpu_evidence

if TYPE_CHECKING:
    from attestation.verifier.appraisal import Appraisal
    from attestation.verifier.gpu.profile import GpuProfile

MAX_EVIDENCE_SIZE = 4 << 20


class GpuFiles(NamedTuple):
    """What the options name beside the evidence: chain, revocation data, manifests, keys of the service."""

    chain: Path | None
    revocation: tuple[Path, ...]
    rims: tuple[Path, ...]
    jwks: Path | None


def is_gpu_file(path: Path) -> bool:
    """Whether a file is taken for GPU evidence. Raises Unusable for one that cannot be read."""
    return is_gpu_evidence(read_bounded(path, MAX_EVIDENCE_SIZE, "evidence file"))


def verify_gpu_file(
    report: Path, files: GpuFiles, policy: Path | None, nonce: bytes | None, at: datetime, *, as_json: bool
) -> None:
    """Appraise GPU evidence, print the verdict, and end with status 0 if it affirms, else 1.

    Raises:
        Unusable: a file, the profile or the nonce cannot be used; the error says which.
    """
    from appliance.evidence_tables import print_appraisal
    from attestation.verifier.gpu.profile import SHOW_GPU

    profile = SHOW_GPU if policy is None else read_gpu_profile(policy)
    appraisal = _appraise(report, files, profile, nonce, at)
    if as_json:
        print_json(appraisal.to_json())
    else:
        print_appraisal(appraisal, str(report), at, about=tuple(gpu_summary(appraisal)))
    raise typer.Exit(0 if appraisal.affirming else 1)


def show_gpu(report: Path, chain: Path | None, *, as_json: bool) -> None:
    """Print what GPU evidence says, decoded. Nothing is verified."""
    from attestation.evidence.gpu.kinds import looks_like_nras_bundle
    from attestation.evidence.gpu.nras import parse_nras_bundle
    from attestation.verifier.gpu.profile import SHOW_GPU

    raw = read_bounded(report, MAX_EVIDENCE_SIZE, "evidence file")
    claims: dict[str, Any]
    if looks_like_nras_bundle(raw):
        bundle = parse_nras_bundle(raw)
        claims = {"overall": dict(bundle.overall.claims)}
        claims["devices"] = {name: dict(token.claims) for name, token in bundle.devices.items()}
    else:
        claims = _appraise(report, GpuFiles(chain, (), (), None), SHOW_GPU, None, datetime.now(UTC)).claims
    if as_json:
        print_json({"verified": False, "claims": claims})
        return
    for line in _lines(claims, ""):
        typer.echo(line)
    typer.echo("\nNot verified. `seal evidence verify` proves who signed it, and judges it.")


def _lines(claims: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in claims.items():
        if isinstance(value, dict):
            yield _printable(f"{indent}{name}")
            yield from _lines(value, indent + "  ")
        else:
            yield _printable(f"{indent}{name:<24} {', '.join(map(str, value)) if isinstance(value, list) else value}")


def _printable(text: str) -> str:
    """The text without what could steer a terminal: a service's or a device's words are not the user's."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _appraise(report: Path, files: GpuFiles, profile: GpuProfile, nonce: bytes | None, at: datetime) -> Appraisal:
    from attestation.verifier.gpu.files import GpuFiles as Files
    from attestation.verifier.gpu.files import appraise_gpu_file

    return appraise_gpu_file(report, Files(*files), profile, nonce=nonce, at=at)


def read_gpu_profile(path: Path) -> GpuProfile:
    """The GPU profile in a file. Raises MalformedProfile, which names the file."""
    from attestation.verifier.gpu.profile import MAX_PROFILE_SIZE, load_gpu_profile

    raw = read_bounded(path, MAX_PROFILE_SIZE, "policy file")
    try:
        return load_gpu_profile(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedProfile(
            "the policy file is no text in UTF-8", where=str(path), do="Write it in TOML."
        ) from error
    except MalformedProfile as error:
        raise MalformedProfile(error.what, where=str(path), do=error.do) from error


def print_gpu_profile(name: str, *, as_json: bool) -> None:
    """Print a ready-made GPU profile, `show-gpu` or `broker-gpu`, as commented TOML or as JSON."""
    from attestation.verifier.gpu.profile import BROKER_GPU, SHOW_GPU
    from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml

    chosen = {profile.name: profile for profile in (SHOW_GPU, BROKER_GPU)}[name]
    if as_json:
        print_json(chosen.model_dump(by_alias=True, mode="json"))
    else:
        typer.echo(gpu_profile_to_toml(chosen), nl=False)


def gpu_summary(appraisal: Appraisal) -> Iterator[tuple[str, str]]:
    """The few claims that tell the devices apart, for people."""
    claims: Mapping[str, Any] = appraisal.claims
    devices = claims.get("devices", {"": claims})
    for name, device in devices.items():
        prefix = f"{name} " if name else ""
        yield f"{prefix}device", _printable(_device(device))
        yield f"{prefix}firmware", _printable(_firmware(device))
    if "nonce" in claims:
        yield "nonce", claims["nonce"]


def _device(claims: Mapping[str, Any]) -> str:
    board = "/".join(str(claims[name]) for name in ("project", "project_sku", "chip_sku") if claims.get(name))
    parts = (claims.get("product") or claims.get("hwmodel"), board, claims.get("ueid"), claims.get("mode"))
    return ", ".join(str(part) for part in parts if part)


def _firmware(claims: Mapping[str, Any]) -> str:
    driver = claims.get("driver_version", claims.get("x-nvidia-gpu-driver-version"))
    vbios = claims.get("vbios_version", claims.get("x-nvidia-gpu-vbios-version"))
    parts = (f"driver {driver}" if driver else "", f"VBIOS {vbios}" if vbios else "")
    return ", ".join(part for part in parts if part) or "not stated"
