"""The appraisal of SEV-SNP evidence: all checks over one report, nothing read from outside, every failure listed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from attestation.endorsements.chain import Chain, Endorsements, resolve_chain
from attestation.endorsements.failure import Failure
from attestation.evidence.hcl import HclEvidence
from attestation.evidence.report import Report, parse_report, product_of
from attestation.evidence.tcb import decode_tcb
from attestation.verifier import certificate_checks, guest_checks, policy_checks, report_checks, tcb_checks, vtpm_checks
from attestation.verifier.appraisal import VECTOR_NAMES, Appraisal, Status
from attestation.verifier.check import CHECKS, NOT_JUDGED, Case, Check, Claim, Expected
from attestation.verifier.claims import chain_claims, report_claims, vtpm_claims
from attestation.verifier.profile import Profile

_SUBJECTS = (certificate_checks, report_checks, tcb_checks, policy_checks, guest_checks, vtpm_checks)

ORDERED: tuple[Check, ...] = tuple(
    one for module in _SUBJECTS for one in CHECKS.values() if one.run.__module__ == module.__name__
)
"""All checks in the order in which they are made: first who signed, then what was signed."""

ALWAYS = frozenset(
    {
        "report-signature",
        "vek-profile",
        "vek-extensions",
        "chain-signatures",
        "chain-profile",
        "trusted-root",
        "vtpm-binding",
        "vtpm-quote",
    }
)
"""Checks without which nothing in the evidence is authentic: no profile turns them off."""

# Without these a claim is not asserted, whatever else of it was judged.
_NEEDED = {
    Claim.INSTANCE_IDENTITY.value: ("freshness", "revocation"),
    Claim.EXECUTABLES.value: ("measurement",),
}

# AR4SI: 2 for each, but executables 3: what is measured is what was loaded at boot.
_AFFIRMED = {claim.value: 3 if claim is Claim.EXECUTABLES else 2 for claim in Claim}
_AFFIRMED_WITHOUT_INIT_DATA = 3  # configuration: no known weakness, but not a known configuration
_WARNING = 32
_CONTRAINDICATED = 96
_NOT_AUTHENTIC = 99  # AR4SI: "cryptographic validation of the evidence has failed", whatever the claim


def verify_snp(
    report: bytes, endorsements: Endorsements, profile: Profile, expected: Expected, at: datetime
) -> Appraisal:
    """Appraise one SEV-SNP report at the time `at` (aware).

    Raises:
        MalformedEvidence: `report` is not 1184 bytes.
        MalformedEndorsement: a certificate or a revocation list cannot be read.
        ValueError: `at` has no time zone.
    """
    return _verify(report, endorsements, profile, expected, at, None)


def verify_hcl(
    evidence: HclEvidence, endorsements: Endorsements, profile: Profile, expected: Expected, at: datetime
) -> Appraisal:
    """Appraise a report that comes in Azure's wrapper, with the quote of the TPM that it vouches for.

    `expected.report_data` is then compared with the quote's extra data: a wrapper without a quote is not fresh.
    The VEK is the evidence's if `endorsements` bring none. Raises what `verify_snp` raises.
    """
    if endorsements.vek is None:
        endorsements = replace(endorsements, vek=evidence.vek)
    return _verify(evidence.hcl.report, endorsements, profile, expected, at, evidence)


def _verify(
    report: bytes,
    endorsements: Endorsements,
    profile: Profile,
    expected: Expected,
    at: datetime,
    vtpm: HclEvidence | None,
) -> Appraisal:
    if at.tzinfo is None:
        raise ValueError("the time of verification needs a time zone")
    parsed = parse_report(report, strict=False)
    chain = resolve_chain(endorsements, profile.pins)
    return _appraise(_case(parsed, chain, profile, expected, at.astimezone(UTC), vtpm))


def _case(
    report: Report, chain: Chain, profile: Profile, expected: Expected, at: datetime, vtpm: HclEvidence | None
) -> Case:
    product = chain.product
    if product is None and report.cpuid_fam_id is not None and report.cpuid_mod_id is not None:
        product = product_of(report.cpuid_fam_id, report.cpuid_mod_id)
    if product is None:
        return Case(report, profile, expected, chain, at, None, None, None, None, None, vtpm)
    return Case(
        report=report,
        profile=profile,
        expected=expected,
        chain=chain,
        at=at,
        product=product,
        reported=decode_tcb(report.reported_tcb, product, strict=False),
        current=decode_tcb(report.current_tcb, product, strict=False),
        committed=decode_tcb(report.committed_tcb, product, strict=False),
        launch=decode_tcb(report.launch_tcb, product, strict=False),
        vtpm=vtpm,
    )


def _appraise(case: Case) -> Appraisal:
    severities = case.profile.severities
    failures: list[Failure] = []
    not_judged: list[str] = []
    worst: dict[str, int] = {}
    authentic = True
    for one in ORDERED:
        name = one.name
        severity = severities.get(name, "refuse")
        if severity == "allow":
            continue
        verdict = one.run(case)
        if verdict is None:
            continue
        if verdict is NOT_JUDGED:
            not_judged.append(name)
            continue
        failures.append(Failure(name, *verdict))
        if name in ALWAYS:
            authentic = False
        value = _WARNING if severity == "warn" else _CONTRAINDICATED
        worst[one.claim.value] = max(value, worst.get(one.claim.value, 0))
    for name in case.profile.required:
        if name in not_judged or severities[name] == "allow":
            failures.append(Failure(name, "not judged", f"a judgement, which profile {case.profile.name!r} demands"))
            worst[CHECKS[name].claim.value] = _CONTRAINDICATED
    status = _status(case, failures, worst)
    vector = dict.fromkeys(VECTOR_NAMES, 0) if status == "none" else _vector(worst, not_judged, severities, authentic)
    return Appraisal(
        status=status,
        failures=tuple(failures),
        not_judged=tuple(not_judged),
        vector=vector,
        profile=case.profile.name,
        decode=partial(_claims, case),
    )


def _status(case: Case, failures: list[Failure], worst: dict[str, int]) -> Status:
    if not case.chain.validities:
        return "none"  # there is no certificate: nothing was said by anybody
    if not failures:
        return "affirming"
    return "contraindicated" if _CONTRAINDICATED in worst.values() else "warning"


def _vector(
    worst: dict[str, int], not_judged: list[str], severities: dict[str, Any], authentic: bool
) -> dict[str, int]:
    vector = dict.fromkeys(VECTOR_NAMES, 0)

    def unjudged(name: str) -> bool:
        return name in not_judged or severities[name] == "allow"

    for claim, affirmed in _AFFIRMED.items():
        if not authentic:
            value = _NOT_AUTHENTIC
        elif claim in worst:
            value = worst[claim]
        elif any(map(unjudged, _NEEDED.get(claim, ()))):
            value = 0
        elif claim == Claim.CONFIGURATION.value and unjudged("init-data"):
            value = _AFFIRMED_WITHOUT_INIT_DATA
        else:
            value = affirmed
        vector[claim] = value
    return vector


def _claims(case: Case) -> dict[str, Any]:
    virtual = case.chain.virtual or (case.chain.root is not None and case.chain.root.virtual)
    return {
        "product": case.product.value if case.product else None,
        "platform": "virtual" if virtual else "hardware",
        **report_claims(case.report, case.product),
        **chain_claims(case.chain),
        **({} if case.vtpm is None else {"vtpm": vtpm_claims(case.vtpm)}),
    }
