"""The appraisal of GPU and switch evidence: all checks over each device and over all of them, every failure listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any

from attestation.endorsements.certificates import spki_sha256
from attestation.endorsements.failure import Failure
from attestation.endorsements.nvidia import NVIDIA_DEVICE_ROOT, VerifiedRim, resolve_device_chain, verify_rim
from attestation.endorsements.nvidia_endorsements import MAX_RIMS
from attestation.endorsements.nvidia_revocation import RevocationData, revocation_of
from attestation.errors import MalformedEvidence
from attestation.evidence.gpu.document import MAX_DEVICES, GpuEvidence
from attestation.evidence.gpu.opaque import NVDEC_DISABLED
from attestation.evidence.gpu.rim import RimKind
from attestation.evidence.gpu.spdm import NONCE_SIZE, GpuReport, parse_gpu_report
from attestation.verifier.appraisal import VECTOR_NAMES, Appraisal, Status
from attestation.verifier.gpu import device_checks, group_checks, state_checks
from attestation.verifier.gpu.check import (
    CHECKS,
    GROUP_CHECKS,
    NOT_JUDGED,
    Claim,
    GpuCase,
    GpuCheck,
    GpuExpected,
    RimMatch,
    Verdict,
)
from attestation.verifier.gpu.facts import Facts, is_switch, read_facts
from attestation.verifier.gpu.profile import SWITCHABLE, GpuProfile

_SUBJECTS = (device_checks, state_checks, group_checks)

ORDERED: tuple[GpuCheck, ...] = (*CHECKS.values(), *GROUP_CHECKS.values())
"""All checks in the order in which they are made: who signed, what was signed, how the devices stand together."""

ALWAYS = frozenset(CHECKS) - frozenset(SWITCHABLE)
"""Checks without which nothing is authentic: no profile turns them off."""

NVDEC_MEASUREMENT = 35
"""The measurement (index from 0) that has no meaning while NVDEC0 is disabled, as NVIDIA's verifiers have it."""

# Without these a claim is not asserted, whatever else of it was judged.
_NEEDED = {
    Claim.INSTANCE_IDENTITY: ("gpu-freshness", "gpu-revocation", "rim-revocation"),
    Claim.CONFIGURATION: ("gpu-devtools", "gpu-topology"),
    Claim.EXECUTABLES: ("gpu-driver-measurements", "gpu-vbios-measurements"),
}
_JUDGED_CLAIMS = (Claim.INSTANCE_IDENTITY, Claim.CONFIGURATION, Claim.EXECUTABLES, Claim.HARDWARE)
_AFFIRMED = {Claim.EXECUTABLES: 3}  # AR4SI: what is measured is what was loaded at boot
_WARNING = 32
_CONTRAINDICATED = 96
_NOT_AUTHENTIC = 99


@dataclass(frozen=True, slots=True)
class DevicesAppraisal:
    """What the verifier found of devices that were attested together.

    Attributes:
        whole: One verdict over all: the worst of each. Its claims have each device's under `devices`.
        devices: Each device's own verdict by name (`gpu0`, `gpu1`, …, `switch0`, …); what all share is in each.
    """

    whole: Appraisal
    devices: Mapping[str, Appraisal]


def verify_gpu(
    evidence: GpuEvidence,
    profile: GpuProfile,
    expected: GpuExpected,
    *,
    rims: Sequence[bytes] = (),
    revocation: RevocationData | None = None,
    at: datetime,
) -> Appraisal:
    """Appraise one GPU or switch at the time `at` (aware).

    `rims` are manifests of any version: those for this device's driver, VBIOS and chip are compared.

    Raises:
        MalformedEvidence: the report cannot be read.
        MalformedEndorsement: a chain, a manifest or revocation data cannot be read.
        ValueError: `at` has no time zone, or the nonce expected has not 32 bytes.
    """
    return verify_devices((evidence,), profile, expected, rims=rims, revocation=revocation, at=at).whole


def verify_devices(
    devices: Sequence[GpuEvidence],
    profile: GpuProfile,
    expected: GpuExpected,
    *,
    rims: Sequence[bytes] = (),
    revocation: RevocationData | None = None,
    at: datetime,
) -> DevicesAppraisal:
    """Appraise GPUs and switches that belong together: one bad device makes the whole bad.

    Raises:
        MalformedEvidence: no device or more than 64, or a report that cannot be read.
        MalformedEndorsement: a chain, a manifest or revocation data cannot be read.
        ValueError: `at` has no time zone, or the nonce expected has not 32 bytes.
    """
    if at.tzinfo is None:
        raise ValueError("the time of verification needs a time zone")
    if expected.nonce is not None and len(expected.nonce) != NONCE_SIZE:
        raise ValueError(f"an SPDM nonce has {NONCE_SIZE} bytes")
    if not 1 <= len(devices) <= MAX_DEVICES:
        raise MalformedEvidence(f"{len(devices)} devices", where="GPU evidence", do="Give between 1 and 64 devices.")
    if len(rims) > MAX_RIMS:
        raise MalformedEvidence(f"{len(rims)} manifests", where="GPU evidence", do=f"Give at most {MAX_RIMS}.")
    counting = (raw for raw in rims if not profile.manifests or sha256(raw).hexdigest() in profile.manifests)
    manifests = tuple(verify_rim(raw, profile.rim_roots) for raw in counting)
    data = revocation or RevocationData()
    cases = tuple(_case(one, profile, expected, manifests, data, at.astimezone(UTC)) for one in devices)
    shared = [(one, one.run_group(cases)) for one in GROUP_CHECKS.values() if one.run_group is not None]
    names = _names(cases)
    appraisals = {name: _appraise(case, shared) for name, case in zip(names, cases, strict=True)}
    if len(cases) == 1:
        return DevicesAppraisal(appraisals[names[0]], appraisals)
    return DevicesAppraisal(_whole(appraisals, frozenset(one.name for one, _ in shared)), appraisals)


def _names(cases: tuple[GpuCase, ...]) -> list[str]:
    names: list[str] = []
    for case in cases:
        kind = "switch" if case.switch else "gpu"
        names.append(f"{kind}{sum(name.startswith(kind) for name in names)}")
    return names


def _case(
    evidence: GpuEvidence,
    profile: GpuProfile,
    expected: GpuExpected,
    manifests: tuple[VerifiedRim, ...],
    data: RevocationData,
    at: datetime,
) -> GpuCase:
    report = parse_gpu_report(evidence.report)
    chain = resolve_device_chain(evidence.chain, profile.device_roots)
    facts = read_facts(report, chain.model)
    days = profile.revocation.max_age_days
    max_age = timedelta(days=days) if days else None
    rims = {kind: _match(kind, manifests, report, facts, chain.model, data, at, max_age) for kind in RimKind}
    return GpuCase(
        evidence=evidence,
        report=report,
        facts=facts,
        chain=chain,
        profile=profile,
        expected=expected,
        at=at,
        revocation=revocation_of(chain.certificates, data, at, max_age=max_age, first=1),
        rims=rims,
    )


def _match(
    kind: RimKind,
    manifests: tuple[VerifiedRim, ...],
    report: GpuReport,
    facts: Facts,
    model: str | None,
    data: RevocationData,
    at: datetime,
    max_age: timedelta | None,
) -> RimMatch:
    version = facts.driver_version if kind is RimKind.DRIVER else facts.vbios_version
    chip = (model or "").replace("_", "")  # certificates say LS_10, other documents of the vendor LS10
    matching = tuple(
        one
        for one in manifests
        if one.rim.kind is kind and one.rim.version == version and one.rim.product.replace("_", "") == chip
    )
    # Boards that share a VBIOS version have manifests of their own, which do not name their board: the best fit is it.
    authentic = sorted(
        ((_mismatches(one, report, facts, model), one) for one in matching if not one.failures),
        key=lambda pair: len(pair[0]),
    )
    if not authentic:
        return RimMatch(matching, None, (), ())
    mismatches, chosen = authentic[0]
    return RimMatch(matching, chosen, mismatches, revocation_of(chosen.certificates, data, at, max_age=max_age))


def _mismatches(manifest: VerifiedRim, report: GpuReport, facts: Facts, model: str | None) -> tuple[int, ...]:
    found = {block.index - 1: block.value for block in report.measurements}
    skipped = {NVDEC_MEASUREMENT} if facts.nvdec0 == NVDEC_DISABLED and not is_switch(model) else set()
    return tuple(
        index
        for index, values in sorted(manifest.rim.golden.items())
        if index not in skipped and found.get(index) not in values
    )


def _appraise(case: GpuCase, shared: list[tuple[GpuCheck, Verdict]]) -> Appraisal:
    failures: list[Failure] = []
    not_judged: list[str] = []
    worst: dict[Claim, int] = {}
    own = [(one, one.run) for one in CHECKS.values() if one.run is not None]
    verdicts = [(one, run(case)) for one, run in own if case.profile.severity(one.name) != "allow"]
    for one, verdict in (*verdicts, *(pair for pair in shared if case.profile.severity(pair[0].name) != "allow")):
        if verdict is None:
            continue
        if verdict is NOT_JUDGED:
            not_judged.append(one.name)
            continue
        failures.append(Failure(one.name, *verdict))
        value = _WARNING if case.profile.severity(one.name) == "warn" else _CONTRAINDICATED
        worst[one.claim] = max(value, worst.get(one.claim, 0))
    for name in case.profile.required:
        if name in not_judged or case.profile.severity(name) == "allow":
            failures.append(Failure(name, "not judged", f"a judgement, which profile {case.profile.name!r} demands"))
            worst[_BY_NAME[name].claim] = _CONTRAINDICATED
    authentic = not any(failure.check in ALWAYS for failure in failures)
    return Appraisal(
        status=_status(worst),
        failures=tuple(failures),
        not_judged=tuple(not_judged),
        vector=_vector(worst, not_judged, case.profile, authentic),
        profile=case.profile.name,
        decode=partial(_claims, case),
    )


_BY_NAME = {one.name: one for one in ORDERED}


def _status(worst: Mapping[Claim, int]) -> Status:
    if not worst:
        return "affirming"
    return "contraindicated" if _CONTRAINDICATED in worst.values() else "warning"


def _vector(worst: dict[Claim, int], not_judged: list[str], profile: GpuProfile, authentic: bool) -> dict[str, int]:
    vector = dict.fromkeys(VECTOR_NAMES, 0)
    for claim in _JUDGED_CLAIMS:
        if not authentic:
            vector[claim.value] = _NOT_AUTHENTIC
        elif claim in worst:
            vector[claim.value] = worst[claim]
        elif not any(name in not_judged or profile.severity(name) == "allow" for name in _NEEDED.get(claim, ())):
            vector[claim.value] = _AFFIRMED.get(claim, 2)
    return vector


def _whole(appraisals: Mapping[str, Appraisal], shared: frozenset[str]) -> Appraisal:
    """The worst of each: failures with their device's name, those of all devices together once."""
    failures: list[Failure] = []
    for name, one in appraisals.items():
        for failure in one.failures:
            named = (
                failure
                if failure.check in shared
                else Failure(failure.check, f"{name}: {failure.value}", failure.expected)
            )
            if named not in failures:
                failures.append(named)
    statuses: set[Status] = {one.status for one in appraisals.values()}
    order: tuple[Status, ...] = ("none", "contraindicated", "warning", "affirming")
    first = next(iter(appraisals.values()))
    return Appraisal(
        status=next(status for status in order if status in statuses),
        failures=tuple(failures),
        not_judged=tuple(dict.fromkeys(name for one in appraisals.values() for name in one.not_judged)),
        vector={name: worst_value([one.vector[name] for one in appraisals.values()]) for name in VECTOR_NAMES},
        profile=first.profile,
        decode=lambda: {"devices": {name: one.claims for name, one in appraisals.items()}},
    )


def worst_value(values: Sequence[int]) -> int:
    """The AR4SI value of several: the worst if one is no longer affirming, no assertion if one makes none."""
    if max(values) >= _WARNING:
        return max(values)
    return 0 if min(values) == 0 else max(values)


def _claims(case: GpuCase) -> dict[str, Any]:
    chain = case.chain
    genuine = not chain.failures and _ends_in_nvidia(case)
    return {
        "product": chain.model,
        "platform": "hardware" if genuine else "unknown",
        "kind": "switch" if case.switch else "gpu",
        "ueid": chain.ueid,
        "certificate_serial": chain.serial,
        "pdi": None if chain.pdi is None else chain.pdi.hex(),
        "certified_fwid": None if chain.fwid is None else chain.fwid.hex(),
        "nonce": case.report.request_nonce.hex(),
        **case.facts.as_claims(),
        "measurements": {str(block.index - 1): block.value.hex() for block in case.report.measurements},
        "manifests": {
            kind.value: None if match.chosen is None else match.chosen.rim.version for kind, match in case.rims.items()
        },
        "revocation": {one.name: one.standing.value for one in case.revocation},
    }


def _ends_in_nvidia(case: GpuCase) -> bool:
    return spki_sha256(case.chain.certificates[-1]) == NVIDIA_DEVICE_ROOT
