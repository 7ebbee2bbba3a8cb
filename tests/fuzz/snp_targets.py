"""What a fuzzer feeds with bytes for SEV-SNP evidence: one function a parser, each raising for a defect alone.

A parser may refuse input by its own error. Anything else that leaves it is a defect, and so is a report that was read
and does not come back, or a verdict that affirms what nobody signed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from attestation.canonical import read_json_object
from attestation.endorsements.certificates import load_certificate
from attestation.endorsements.chain import Endorsements, resolve_chain
from attestation.endorsements.roots import AMD_ROOTS
from attestation.endorsements.sources import from_certificate_table
from attestation.endorsements.vek import read_vek_extensions
from attestation.errors import MalformedEndorsement, MalformedEvidence, MalformedProfile
from attestation.evidence.azure_json import parse_azure_evidence
from attestation.evidence.certificate_table import parse_certificate_table
from attestation.evidence.guest_components_json import parse_guest_components
from attestation.evidence.hcl import parse_hcl_report
from attestation.evidence.id_block import verify_id_block
from attestation.evidence.report import REPORT_SIZE, encode_report, parse_report
from attestation.evidence.tpm_quote import parse_tpm_quote
from attestation.verifier import Expected, load_profile, verify_snp
from attestation.verifier.profile_toml import profile_to_toml
from policies.errors import Unusable

AT = datetime(2026, 6, 1, tzinfo=UTC)
VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "virtual"
GOOD = Endorsements(
    vek=(VECTORS / "Genoa/vcek.pem").read_bytes(),
    intermediates=((VECTORS / "Genoa/ask.pem").read_bytes(), (VECTORS / "Genoa/ark.pem").read_bytes()),
    crls=((VECTORS / "Genoa/crl.pem").read_bytes(),),
)
PROFILE = load_profile((VECTORS / "profile.toml").read_text())
SIGNED = {path.read_bytes() for path in (VECTORS / "reports").iterdir()}


def report(raw: bytes) -> None:
    """A report, strictly and not, and its verdict under a good chain."""
    try:
        if encode_report(parse_report(raw)) != raw:
            raise AssertionError("a report that was read does not come back")
    except MalformedEvidence:
        if len(raw) != REPORT_SIZE:
            return
    appraisal = verify_snp(raw, GOOD, PROFILE, Expected(), AT)
    json.dumps(appraisal.to_json())
    if appraisal.affirming and raw not in SIGNED:
        raise AssertionError("a report that nobody signed was affirmed")


def certificate_table(raw: bytes) -> None:
    """A host's certificate table, and the chain that it would make."""
    with contextlib.suppress(MalformedEvidence, MalformedEndorsement):
        entries = parse_certificate_table(raw)
        if sum(len(content) for _, content in entries) > len(raw):
            raise AssertionError("a table holds more than its bytes")
        resolve_chain(from_certificate_table(raw), AMD_ROOTS)


def certificate(raw: bytes) -> None:
    """A certificate in the place of VEK, of authority and of both."""
    with contextlib.suppress(MalformedEndorsement):
        read_vek_extensions(load_certificate(raw))
    for endorsements in (
        Endorsements(raw, GOOD.intermediates),
        Endorsements(GOOD.vek, (raw, *GOOD.intermediates[1:])),
        Endorsements(GOOD.vek, (*GOOD.intermediates[:1], raw)),
        Endorsements(raw, (raw,)),
    ):
        with contextlib.suppress(MalformedEndorsement):
            chain = resolve_chain(endorsements, AMD_ROOTS)
            if not chain.failures:
                raise AssertionError("a chain of no root of AMD's was believed")


def revocation_list(raw: bytes) -> None:
    """A revocation list beside a good chain."""
    with contextlib.suppress(MalformedEndorsement):
        resolve_chain(Endorsements(GOOD.vek, GOOD.intermediates, (raw,)), PROFILE.pins)


def hcl_report(raw: bytes) -> None:
    """Azure's wrapper."""
    with contextlib.suppress(MalformedEvidence):
        parse_hcl_report(raw)


def tpm_quote(raw: bytes) -> None:
    """A TPM's quote."""
    with contextlib.suppress(MalformedEvidence):
        parse_tpm_quote(raw, bytes(256), (bytes(32),) * 24)


def json_evidence(raw: bytes) -> None:
    """Evidence in JSON, of either kind."""
    try:
        document = read_json_object(raw, where="fuzzer", limit=1 << 20)
    except Unusable:
        return
    with contextlib.suppress(MalformedEvidence):
        rebuilt = parse_guest_components(document).report
        if len(rebuilt) != REPORT_SIZE:
            raise AssertionError("a rebuilt report has another size")
    with contextlib.suppress(MalformedEvidence):
        parse_azure_evidence(document)


def id_block(raw: bytes) -> None:
    """An ID block and its authentication, one after the other."""
    with contextlib.suppress(MalformedEvidence):
        verify_id_block(raw[:96], raw[96:])


def profile(raw: bytes) -> None:
    """A profile in TOML, printed and read again."""
    with contextlib.suppress(MalformedProfile, UnicodeDecodeError):
        read = load_profile(raw.decode())
        if load_profile(profile_to_toml(read)) != read:
            raise AssertionError("a profile that was read does not come back")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "report": report,
    "certificate-table": certificate_table,
    "certificate": certificate,
    "revocation-list": revocation_list,
    "hcl-report": hcl_report,
    "tpm-quote": tpm_quote,
    "json-evidence": json_evidence,
    "id-block": id_block,
    "profile": profile,
}
"""Targets by name."""
