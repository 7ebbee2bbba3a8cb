"""What `seal evidence` reads and says of GPUs and switches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from appliance.evidence_files import MAX_EVIDENCE_SIZE, read_profile_file
from attestation.endorsements.sources import read_bounded
from attestation.evidence.gpu.kinds import is_gpu_evidence

if TYPE_CHECKING:
    from attestation.verifier.appraisal import Appraisal
    from attestation.verifier.gpu.profile import GpuProfile


class GpuFiles(NamedTuple):
    """What the options name beside the evidence: chain, revocation data, manifests, keys of the service."""

    chain: Path | None
    revocation: tuple[Path, ...]
    rims: tuple[Path, ...]
    jwks: Path | None


def is_gpu_file(path: Path) -> bool:
    """Whether a file is taken for GPU evidence. Raises Unusable for one that cannot be read."""
    return is_gpu_evidence(read_bounded(path, MAX_EVIDENCE_SIZE, "evidence file"))


def appraise_gpu(report: Path, files: GpuFiles, policy: Path | None, nonce: bytes | None, at: datetime) -> Appraisal:
    """The verdict on GPU evidence. Raises Unusable: a file, the profile or the nonce cannot be used."""
    from attestation.verifier.gpu.profile import SHOW_GPU, load_gpu_profile

    profile = SHOW_GPU if policy is None else read_profile_file(policy, load_gpu_profile)
    return _appraise(report, files, profile, nonce, at)


def gpu_claims(report: Path, chain: Path | None) -> dict[str, Any]:
    """What GPU evidence says, decoded. Nothing is verified."""
    from attestation.evidence.gpu.kinds import looks_like_nras_bundle
    from attestation.evidence.gpu.nras import parse_nras_bundle
    from attestation.verifier.gpu.profile import SHOW_GPU

    raw = read_bounded(report, MAX_EVIDENCE_SIZE, "evidence file")
    if not looks_like_nras_bundle(raw):
        return dict(_appraise(report, GpuFiles(chain, (), (), None), SHOW_GPU, None, datetime.now(UTC)).claims)
    bundle = parse_nras_bundle(raw)
    devices = {name: dict(token.claims) for name, token in bundle.devices.items()}
    return {"overall": dict(bundle.overall.claims), "devices": devices}


def print_gpu_claims(claims: Mapping[str, Any]) -> None:
    """Print every claim on a line, for people."""
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
