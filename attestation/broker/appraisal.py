"""From evidence to an EAR, or to every reason against one: a function of bytes, a charter and a moment.

The host chooses a guest's init-data, so it earns nothing by itself. An EAR is given only if

1. there is init-data, and the report's HOST_DATA is its SHA-256;
2. it names this charter's root;
3. the place it names is enrolled, with this very init-data, on this chip if chips are listed;
4. the report verifies under the charter's appraisal profile, with the REPORT_DATA that the session expects and the
   measurement of an approved image: the enrolled one, approved for this role;
5. the charter's further demands (`policies/appraisal.rego`, if it has any) are met.

An auditor runs the same function over the same bytes years later (attestation.broker.audit).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from attestation.broker.sessions import Protocol
from attestation.ear import POLICY, PROFILE, CharterReference, EarDocument, Subject, SubmoduleAppraisal
from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import Product
from attestation.verifier import BROKER, Appraisal, Expected, Profile, load_profile, verify_snp, with_virtual_roots
from policies.charter import Charter
from policies.documents import INIT_DATA_LIMIT, Enrolment, InitData, VirtualRoot, parse_init_data
from policies.errors import SealwrightError
from policies.questions import appraisal_reasons

KBS_INIT_DATA_KEY: Final = "sealwright.toml"
"""Where a CoCo init-data document (`[data]`) carries ours."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be appraised. `report_data` is what this session's REPORT_DATA must be (64 bytes)."""

    evidence: SnpEvidence
    init_data: bytes | None
    report_data: bytes
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome: `reasons` against, or (if there are none) the guest's place and its appraisal."""

    reasons: tuple[str, ...]
    init_data: InitData | None
    enrolment: Enrolment | None
    subject: Subject | None
    appraisal: Appraisal | None

    @property
    def who(self) -> str:
        """The place that the guest claims, `role/name`, or `guest`."""
        return f"{self.init_data.role}/{self.init_data.name}" if self.init_data else "guest"

    @property
    def claims(self) -> Mapping[str, Any]:
        """The report's claims, as far as it could be read."""
        return self.appraisal.claims if self.appraisal else {}


def appraise_guest(question: Question, charter: Charter, at: datetime) -> Verdict:
    """Appraise a guest. Never raises for what the evidence is."""
    reasons: list[str] = []
    init = _init_data(question, charter, reasons)
    enrolment = charter.enrolment(init.role, init.name) if init is not None else None
    if init is not None and enrolment is None:
        reasons.append(f"{init.role}/{init.name} is not enrolled in charter version {charter.version}")
    digest = sha256(question.init_data or b"").hexdigest()
    if enrolment is not None and enrolment.init_data_sha256 != digest:
        reasons.append(f"{enrolment.role}/{enrolment.name} is enrolled with other init-data")
    appraisal = _appraise(question, charter, enrolment, at, reasons)
    subject = None
    if appraisal is not None and enrolment is not None:
        subject = _place(appraisal, enrolment, charter, reasons)
        if not reasons:
            reasons += appraisal_reasons(charter, appraisal.to_json(), enrolment, at)
    return Verdict(tuple(reasons), init, enrolment, subject, appraisal)


def build_ear(
    verdict: Verdict,
    charter: Charter,
    *,
    broker: str,
    nonce: str,
    keys: Mapping[str, str],
    at: datetime,
    runtime: Mapping[str, Any] | None = None,
) -> EarDocument:
    """The EAR of a verdict without reasons. `keys` are SHA-256 by purpose; `runtime` is a KBS guest's runtime data."""
    if verdict.reasons or verdict.appraisal is None or verdict.subject is None:
        raise ValueError("an EAR needs an affirming verdict")
    evidence = {**verdict.appraisal.claims, **({"runtime_data_claims": dict(runtime)} if runtime is not None else {})}
    issued = int(at.timestamp())
    return EarDocument(
        eat_profile=PROFILE,
        iat=issued,
        exp=issued + charter.consortium.attestation_interval_seconds,
        iss=broker,
        nonce=nonce,
        charter=CharterReference(id=charter.id, version=charter.version),
        platform=charter.consortium.platform,
        subject=verdict.subject,
        keys=dict(keys),
        submods={
            "cpu0": SubmoduleAppraisal(
                status=verdict.appraisal.status, vector=dict(verdict.appraisal.vector), policy=POLICY, evidence=evidence
            )
        },
    )


def charter_profile(charter: Charter) -> Profile:
    """The verifier's profile under which this charter's guests are appraised.

    `policies/appraisal.toml` if the charter has it, else the strict built-in one; a virtual charter's roots in place of
    the hardware vendors'. Raises MalformedProfile.
    """
    return _profile(charter.policy("appraisal.toml"), charter.consortium.virtual_roots)


@lru_cache(maxsize=16)
def _profile(text: str | None, virtual_roots: tuple[VirtualRoot, ...]) -> Profile:
    profile = BROKER if text is None else load_profile(text)
    if virtual_roots:
        pins = (RootPin(Product(root.product), root.ark_spki_sha256, virtual=True) for root in virtual_roots)
        return with_virtual_roots(profile, pins)
    return profile


def _init_data(question: Question, charter: Charter, reasons: list[str]) -> InitData | None:
    if question.init_data is None:
        reasons.append("the evidence comes without init-data")
        return None
    try:
        raw = question.init_data if question.protocol == "v1" else nested_init_data(question.init_data)
        init = parse_init_data(raw)
    except SealwrightError as error:
        reasons.append(f"the init-data cannot be used: {error.what}")
        return None
    if init.charter != charter.id:
        reasons.append(f"the init-data names another charter ({init.charter[:16]}…)")
    return init


def nested_init_data(raw: bytes) -> bytes:
    """Our init-data inside a CoCo init-data document (`data."sealwright.toml"`), or `raw` itself if it is none."""
    if len(raw) > INIT_DATA_LIMIT:
        return raw  # refused by its size where it is parsed
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        return raw  # refused where it is parsed
    data = table.get("data")
    ours = data.get(KBS_INIT_DATA_KEY) if isinstance(data, dict) else None
    if isinstance(ours, str) and table.get("algorithm") == "sha256":
        return ours.encode("utf-8")
    return raw


def _appraise(
    question: Question, charter: Charter, enrolment: Enrolment | None, at: datetime, reasons: list[str]
) -> Appraisal | None:
    measurements = frozenset(
        bytes.fromhex(reference.measurement) for image in charter.images() for reference in image.measurements
    )
    chips = None if enrolment is None or enrolment.chips is None else frozenset(map(bytes.fromhex, enrolment.chips))
    expected = Expected(
        report_data=question.report_data,
        measurements=measurements,
        host_data=sha256(question.init_data).digest() if question.init_data is not None else None,
        chips=chips,
    )
    try:
        endorsements = from_certificate_table(question.evidence.certificates)
        appraisal = verify_snp(question.evidence.report, endorsements, charter_profile(charter), expected, at)
    except SealwrightError as error:
        reasons.append(f"the evidence cannot be used: {error.what} ({error.where})")
        return None
    reasons += map(str, appraisal.failures)
    if appraisal.status != "affirming" and not appraisal.failures:
        reasons.append(f"the appraisal is {appraisal.status}, not affirming")
    if appraisal.claims.get("platform") != charter.consortium.platform:
        reasons.append(
            f"the guest is {appraisal.claims.get('platform')}; this charter is {charter.consortium.platform}"
        )
    return appraisal


def _place(appraisal: Appraisal, enrolment: Enrolment, charter: Charter, reasons: list[str]) -> Subject:
    image = charter.image_by_measurement(str(appraisal.claims.get("measurement")))
    place = f"{enrolment.role}/{enrolment.name}"
    if image is not None and image.name != enrolment.image:
        reasons.append(f"{place} is enrolled with the image {enrolment.image}, it runs {image.name}")
    if image is not None and enrolment.role not in image.roles:
        reasons.append(f"the image {image.name} is not approved for the role {enrolment.role}")
    return Subject(role=enrolment.role, name=enrolment.name, member=enrolment.member, image=enrolment.image)
