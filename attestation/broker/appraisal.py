"""From evidence to an EAR, or to every reason against one: a function of bytes, a charter and a moment.

The host chooses a guest's init-data, so it earns nothing by itself. An EAR is given only if

1. there is init-data, and the report's HOST_DATA is its SHA-256;
2. it names this charter's root;
3. the place it names is enrolled, with this very init-data, on this chip if chips are listed;
4. the report verifies under the charter's appraisal policy, with the REPORT_DATA that the session expects and the
   measurement of an approved image: the enrolled one, approved for this role;
5. every further device that comes with it (GPUs, switches) verifies under that policy's section `[gpu]`, with the nonce
   that the session gives: one bad device makes the whole bad;
6. the charter's further demands (`policies/appraisal.rego`, if it has any) are met.

An auditor runs the same function over the same bytes years later (attestation.ledger.retrial).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from attestation.broker.sessions import Protocol
from attestation.canonical import canonical_bytes
from attestation.ear import POLICY, PROFILE, CharterReference, EarDocument, Subject, SubmoduleAppraisal
from attestation.endorsements.nvidia_endorsements import GpuEndorsements, parse_gpu_endorsements
from attestation.endorsements.roots import RootPin
from attestation.endorsements.sources import from_certificate_table
from attestation.evidence.composite import MAX_ADDITIONAL, SnpEvidence
from attestation.evidence.report import Product
from attestation.verifier import Appraisal, Expected, Profile, with_virtual_roots
from attestation.verifier.appraisal_policy import NO_GPU_SECTION, load_appraisal_policy
from attestation.verifier.composite import CPU, CompositeAppraisal, Devices, read_additional_evidence, verify_composite
from policies.charter import Charter
from policies.documents import Enrolment
from policies.errors import SealwrightError
from policies.init_data import INIT_DATA_LIMIT, InitData, parse_init_data
from policies.questions import appraisal_reasons

KBS_INIT_DATA_KEY: Final = "sealwright.toml"
"""Where a CoCo init-data document (`[data]`) carries ours."""


BRIEF_CLAIMS: Final = ("kind", "product", "ueid", "mode", "driver_version", "vbios_version")
"""What a credential says of a further device, beside the verdict."""
MAX_DEVICES: Final = 16
"""GPUs and switches of one guest: twice a machine with eight of them."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a session expects: the CPU's REPORT_DATA (64 bytes), the nonce of further devices (32 bytes), and what both
    are computed from (for the ledger)."""

    report_data: bytes
    device_nonce: bytes
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Additional:
    """Evidence of further devices: the text as it was sent, the 32 bytes with which they must have been asked, and what
    stands beside them (the bytes of GpuEndorsements)."""

    text: str
    nonce: bytes
    endorsements: bytes = field(default_factory=lambda: GpuEndorsements().to_bytes())


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be appraised. `report_data` is what this session's REPORT_DATA must be (64 bytes)."""

    evidence: SnpEvidence
    init_data: bytes | None
    report_data: bytes
    protocol: Protocol
    additional: Additional | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome: `reasons` against, or (if there are none) the guest's place and its appraisal."""

    reasons: tuple[str, ...]
    init_data: InitData | None
    enrolment: Enrolment | None
    subject: Subject | None
    appraisal: Appraisal | None
    devices: Mapping[str, Appraisal] = field(default_factory=dict)

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
    appraisal, devices = _appraise(question, charter, enrolment, at, reasons)
    subject = None
    if appraisal is not None and enrolment is not None:
        subject = _place(appraisal, enrolment, charter, reasons)
        if not reasons:
            told = {name: device.to_json() for name, device in devices.items()}
            reasons += appraisal_reasons(charter, appraisal.to_json(), enrolment, at, devices=told)
    return Verdict(tuple(reasons), init, enrolment, subject, appraisal, devices)


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
    """The EAR of a verdict without reasons, with all claims of each device.

    `keys` are SHA-256 by purpose; `runtime` is a KBS guest's runtime data.
    """
    if verdict.reasons or verdict.appraisal is None or verdict.subject is None:
        raise ValueError("an EAR needs an affirming verdict")
    more = {} if runtime is None else {"runtime_data_claims": dict(runtime)}
    submods = {CPU: _submodule(verdict.appraisal, {**verdict.appraisal.claims, **more})}
    submods |= {name: _submodule(device, device.claims) for name, device in verdict.devices.items()}
    issued = int(at.timestamp())
    return EarDocument(
        eat_profile=PROFILE,
        iat=issued,
        exp=issued + charter.consortium.lease_seconds,
        iss=broker,
        nonce=nonce,
        charter=CharterReference(id=charter.id, version=charter.version),
        platform=charter.consortium.platform,
        subject=verdict.subject,
        keys=dict(keys),
        submods=submods,
    )


def brief_ear(document: EarDocument) -> EarDocument:
    """The EAR as a credential carries it: of each further device the verdict, what it is, and its claims' digest.

    A device's claims (sixty-four measurements) would make a certificate too large for a handshake. The same document if
    there is no further device.
    """
    submods = {
        name: device
        if name == CPU
        else device.model_copy(
            update={
                "evidence": {
                    **{word: device.evidence.get(word) for word in BRIEF_CLAIMS},
                    "claims_sha256": sha256(canonical_bytes(device.evidence)).hexdigest(),
                }
            }
        )
        for name, device in document.submods.items()
    }
    return document.model_copy(update={"submods": submods})


def _submodule(appraisal: Appraisal, evidence: Mapping[str, Any]) -> SubmoduleAppraisal:
    return SubmoduleAppraisal(
        status=appraisal.status, vector=dict(appraisal.vector), policy=POLICY, evidence=dict(evidence)
    )


def charter_profile(charter: Charter) -> Profile:
    """The verifier's profile for the CPUs of this charter's guests. Raises MalformedProfile.

    That of its appraisal policy, a virtual charter's roots in place of the hardware vendors'.
    """
    profile = load_appraisal_policy(charter.policy("appraisal.toml")).cpu
    roots = charter.consortium.virtual_roots
    if not roots:
        return profile
    return with_virtual_roots(
        profile, (RootPin(Product(root.product), root.ark_spki_sha256, virtual=True) for root in roots)
    )


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
) -> tuple[Appraisal | None, Mapping[str, Appraisal]]:
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
    devices = _devices(question.additional, charter, reasons)

    def verified(together: Devices | None) -> CompositeAppraisal | None:
        try:
            endorsements = from_certificate_table(question.evidence.certificates)
            return verify_composite(
                question.evidence.report, endorsements, charter_profile(charter), expected, together, at
            )
        except SealwrightError as error:
            why = f"the evidence cannot be used: {error.what} ({error.where})"
            reasons.extend(() if why in reasons else (why,))
            return None

    found = verified(devices)
    if found is None and devices is not None:
        found = verified(None)  # a device that cannot be read hides nothing of what is against the CPU
    if found is None:
        return None, {}
    for name, part in found.parts.items():
        _against(part, "" if name == CPU else f"{name}: ", charter, reasons)
    return found.cpu, found.devices


def _devices(additional: Additional | None, charter: Charter, reasons: list[str]) -> Devices | None:
    """The further devices as they are to be verified; None if there are none, or none that could be."""
    if additional is None:
        return None
    try:
        profile = load_appraisal_policy(charter.policy("appraisal.toml")).gpu
        if profile is None:
            reasons.append(NO_GPU_SECTION)
            return None
        if len(additional.text) > MAX_ADDITIONAL:
            reasons.append(f"the further devices' evidence has more than {MAX_ADDITIONAL} characters")
            return None
        evidence = read_additional_evidence(additional.text, most=MAX_DEVICES)
        return Devices(evidence, profile, additional.nonce, parse_gpu_endorsements(additional.endorsements))
    except SealwrightError as error:
        reasons.append(f"the evidence of further devices cannot be used: {error.what} ({error.where})")
        return None


def _against(part: Appraisal, name: str, charter: Charter, reasons: list[str]) -> None:
    """What is against one part; `name` leads each sentence about a further device."""
    reasons += [f"{name}{failure}" for failure in part.failures]
    if part.status != "affirming" and not part.failures:
        reasons.append(f"{name}the appraisal is {part.status}, not affirming")
    platform, wanted = part.claims.get("platform"), charter.consortium.platform
    if name and wanted == "hardware" and platform != "hardware":
        reasons.append(f"{name}no vendor known here made this device; this charter is {wanted}")
    if not name and platform != wanted:
        reasons.append(f"the guest is {platform}; this charter is {wanted}")


def _place(appraisal: Appraisal, enrolment: Enrolment, charter: Charter, reasons: list[str]) -> Subject:
    image = charter.image_by_measurement(str(appraisal.claims.get("measurement")))
    place = f"{enrolment.role}/{enrolment.name}"
    if image is not None and image.name != enrolment.image:
        reasons.append(f"{place} is enrolled with the image {enrolment.image}, it runs {image.name}")
    if image is not None and enrolment.role not in image.roles:
        reasons.append(f"the image {image.name} is not approved for the role {enrolment.role}")
    return Subject(role=enrolment.role, name=enrolment.name, member=enrolment.member, image=enrolment.image)
