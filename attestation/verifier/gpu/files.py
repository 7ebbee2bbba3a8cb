"""GPU evidence out of files: what `seal evidence verify` calls for a GPU, a switch, several of them, or an NRAS bundle.

Recognising and reading alone; the verdict is `verify.py`'s and `nras.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from attestation.endorsements.certificates import MAX_CRL_SIZE, load_crl, split_pem
from attestation.endorsements.nvidia import MAX_CHAIN_SIZE
from attestation.endorsements.nvidia_endorsements import MAX_RIMS, GpuEndorsements
from attestation.endorsements.nvidia_revocation import MAX_LISTS, MAX_RESPONSES, RevocationData
from attestation.endorsements.sources import read_bounded
from attestation.errors import MalformedEndorsement
from attestation.evidence.gpu.document import MAX_DOCUMENT_SIZE, GpuEvidence, read_gpu_document
from attestation.evidence.gpu.kinds import looks_like_gpu_report, looks_like_nras_bundle
from attestation.evidence.gpu.nras import MAX_JWKS_SIZE
from attestation.evidence.gpu.rim import MAX_RIM_SIZE
from attestation.evidence.gpu.spdm import NONCE_SIZE, parse_gpu_report
from attestation.verifier.appraisal import Appraisal
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.nras import verify_nras
from attestation.verifier.gpu.profile import GpuProfile
from attestation.verifier.gpu.verify import verify_devices
from policies.errors import Unusable

RIM_SUFFIXES = frozenset({".swidtag", ".xml"})
REVOCATION_SUFFIXES = frozenset({".crl", ".ocsp", ".der", ".pem"})
CHAIN_NAME = "cert_chain.pem"
"""The chain's name in a folder that is given for it."""


@dataclass(frozen=True, slots=True)
class GpuFiles:
    """What stands beside the evidence.

    Attributes:
        chain: The certificate chain of a bare report, PEM, or a folder with it as `cert_chain.pem`; in a folder,
            manifests (`.swidtag`, `.xml`) are taken too.
        revocation: Revocation lists (PEM or DER) and OCSP responses (DER).
        rims: Reference manifests, or folders of them.
        jwks: The keys of the attestation service, for an NRAS bundle.
    """

    chain: Path | None = None
    revocation: tuple[Path, ...] = ()
    rims: tuple[Path, ...] = ()
    jwks: Path | None = None


def appraise_gpu_file(
    evidence: Path,
    files: GpuFiles,
    profile: GpuProfile,
    *,
    nonce: bytes | None,
    at: datetime,
) -> Appraisal:
    """Appraise the GPU evidence in a file at the time `at`.

    `nonce` has 32 bytes, or is a 64-byte REPORT_DATA whose first 32 bytes the devices were asked with.

    Raises:
        Unusable: a file is missing or too large, or the nonce has another length.
        MalformedEvidence, MalformedEndorsement: a file is not what it was given for.
    """
    raw = read_bounded(evidence, MAX_DOCUMENT_SIZE, "evidence")
    expected = GpuExpected(nonce=None if nonce is None else spdm_nonce(nonce))
    if looks_like_nras_bundle(raw):
        if files.jwks is None:
            raise Unusable(
                "an NRAS bundle needs the service's keys",
                where=str(evidence),
                do="Give its JWKS, fetched over TLS from the service (--jwks FILE).",
            )
        return verify_nras(raw, read_bounded(files.jwks, MAX_JWKS_SIZE, "JWKS"), profile, expected, at=at)
    return verify_devices(
        _devices(raw, evidence, files.chain),
        profile,
        expected,
        rims=_rims(files),
        revocation=read_revocation(files.revocation),
        at=at,
    ).whole


def spdm_nonce(value: bytes) -> bytes:
    """The SPDM nonce in a 32-byte nonce or at the head of 64 bytes of REPORT_DATA. Raises Unusable."""
    if len(value) not in (NONCE_SIZE, 2 * NONCE_SIZE):
        raise Unusable(
            f"{len(value)} bytes are no SPDM nonce", where="nonce", do="Give the 32 bytes that the GPU was asked with."
        )
    return value[:NONCE_SIZE]


def _devices(raw: bytes, path: Path, chain: Path | None) -> tuple[GpuEvidence, ...]:
    if not looks_like_gpu_report(raw):
        return read_gpu_document(raw)
    parse_gpu_report(raw)
    if chain is None:
        raise Unusable(
            "a bare GPU report needs its certificate chain",
            where=str(path),
            do="Give it by --chain, or give the evidence document that holds both.",
        )
    file = chain / CHAIN_NAME if chain.is_dir() else chain
    return (GpuEvidence(report=raw, chain=read_bounded(file, MAX_CHAIN_SIZE, "certificate chain")),)


def _rims(files: GpuFiles) -> tuple[bytes, ...]:
    folders = [files.chain] if files.chain is not None and files.chain.is_dir() else []
    paths: list[Path] = []
    for one in (*folders, *files.rims):
        if not one.is_dir():
            paths.append(one)
            continue
        found = sorted(path for path in one.iterdir() if path.suffix in RIM_SUFFIXES and path.is_file())
        if not found and one in files.rims:
            raise Unusable("the folder holds no manifest", where=str(one), do="Put .swidtag or .xml files there.")
        paths += found
    if len(paths) > MAX_RIMS:
        raise Unusable(f"{len(paths)} manifests", where="manifests", do=f"Give at most {MAX_RIMS}.")
    return tuple(read_bounded(path, MAX_RIM_SIZE, "manifest") for path in paths)


def read_endorsement_folder(folder: Path) -> GpuEndorsements:
    """The manifests (`.swidtag`, `.xml`) and the revocation data (`.crl`, `.ocsp`, `.der`, `.pem`) in a folder.

    A folder that is not there holds none. Raises Unusable and MalformedEndorsement as `appraise_gpu_file` does.
    """
    if not folder.is_dir():
        return GpuEndorsements()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    rims = [path for path in files if path.suffix in RIM_SUFFIXES]
    if len(rims) > MAX_RIMS:
        raise Unusable(f"{len(rims)} manifests", where=str(folder), do=f"Keep at most {MAX_RIMS}.")
    return GpuEndorsements(
        tuple(read_bounded(path, MAX_RIM_SIZE, "manifest") for path in rims),
        read_revocation([path for path in files if path.suffix in REVOCATION_SUFFIXES]),
    )


def read_revocation(paths: Sequence[Path]) -> RevocationData:
    """Revocation lists and OCSP responses out of files, told apart by what they are.

    Raises:
        Unusable: a file is missing or too large, or there are too many.
        MalformedEndorsement: a PEM file without lists.
    """
    if len(paths) > MAX_LISTS + MAX_RESPONSES:
        raise Unusable(f"{len(paths)} files", where="revocation data", do="Give fewer.")
    crls: list[bytes] = []
    responses: list[bytes] = []
    for path in paths:
        raw = read_bounded(path, MAX_CRL_SIZE, "revocation data")
        if b"-----BEGIN " in raw:
            crls += split_pem(raw, "X509 CRL")
            continue
        try:
            load_crl(raw)
        except MalformedEndorsement:
            responses.append(raw)  # the OCSP reader says what is wrong if it is neither
        else:
            crls.append(raw)
    return RevocationData(ocsp=tuple(responses), crls=tuple(crls))
