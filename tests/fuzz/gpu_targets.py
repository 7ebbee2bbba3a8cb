"""What a fuzzer feeds with bytes for GPU evidence: one function a parser, each raising for a defect alone.

A parser may refuse input by its own error. Anything else that leaves it is a defect, and so is a report, a document or
a bundle that was read and does not come back from its encoder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import UTC, datetime

from attestation.endorsements.nvidia import resolve_device_chain, verify_rim
from attestation.endorsements.nvidia_revocation import RevocationData, revocation_of
from attestation.errors import MalformedEndorsement, MalformedEvidence, MalformedProfile
from attestation.evidence.gpu.document import read_gpu_document, write_gpu_document
from attestation.evidence.gpu.nras import parse_jwks, parse_nras_bundle
from attestation.evidence.gpu.rim import parse_rim
from attestation.evidence.gpu.spdm import encode_gpu_report, parse_gpu_report
from attestation.verifier.composite import read_additional_evidence
from attestation.verifier.gpu.facts import read_facts
from attestation.verifier.gpu.profile import load_gpu_profile
from attestation.verifier.gpu.profile_toml import gpu_profile_to_toml


def spdm_report(raw: bytes) -> None:
    """A GPU's report, its opaque data decoded for every kind of chip."""
    try:
        report = parse_gpu_report(raw)
    except MalformedEvidence:
        return
    if encode_gpu_report(report) != raw:
        raise AssertionError("a report that was read does not come back")
    for model in ("GH100", "LS_10", None):
        json.dumps(read_facts(report, model).as_claims())


def rim_xml(raw: bytes) -> None:
    """A reference manifest, read and its signature checked (its chain being whatever it brings)."""
    try:
        parse_rim(raw)
        verified = verify_rim.__wrapped__(raw)
    except MalformedEndorsement:
        return
    if not verified.failures and b"NVIDIA" not in raw:
        raise AssertionError("a manifest without NVIDIA's certificates was believed")


def device_chain(raw: bytes) -> None:
    """A device's certificate chain."""
    with contextlib.suppress(MalformedEndorsement):
        resolve_device_chain.__wrapped__(raw)


def gpu_document(raw: bytes) -> None:
    """An evidence document, and the same as a session's additional evidence."""
    with contextlib.suppress(MalformedEvidence):
        devices = read_gpu_document(raw)
        if read_gpu_document(write_gpu_document(devices)) != devices:
            raise AssertionError("a document that was read does not come back")
    with contextlib.suppress(MalformedEvidence):
        read_additional_evidence('{"nvidia": ' + raw.decode("utf-8", "replace") + "}")


def nras_bundle(raw: bytes) -> None:
    """Tokens of the attestation service, and its key set."""
    with contextlib.suppress(MalformedEvidence):
        parse_nras_bundle(raw)
    with contextlib.suppress(MalformedEndorsement):
        parse_jwks(raw)


def revocation_data(raw: bytes) -> None:
    """An OCSP response or a revocation list."""
    for data in (RevocationData(ocsp=(raw,)), RevocationData(crls=(raw,))):
        with contextlib.suppress(MalformedEndorsement):
            revocation_of((), data, _NEVER, max_age=None)


def gpu_profile(raw: bytes) -> None:
    """A GPU profile in TOML."""
    with contextlib.suppress(MalformedProfile):
        profile = load_gpu_profile(raw.decode("utf-8", "replace"))
        if load_gpu_profile(gpu_profile_to_toml(profile)) != profile:
            raise AssertionError("a profile that was read does not come back")


_NEVER = datetime(2026, 1, 1, tzinfo=UTC)

TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (spdm_report, rim_xml, device_chain, gpu_document, nras_bundle, revocation_data, gpu_profile)
}
"""Targets by name."""
