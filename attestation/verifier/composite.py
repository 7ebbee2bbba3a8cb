"""Composite evidence: a CPU's report, and devices (GPUs, switches) that are bound to the same session.

How they are bound is `attestation.binding`'s: the CPU's REPORT_DATA is over the devices' evidence as text, and each
device was asked with a nonce of the session. Here are the two verdicts that follow: each part's own, and the worst of
all, which is the whole's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final

from attestation.canonical import canonical_bytes, read_json_object
from attestation.endorsements.chain import Endorsements
from attestation.endorsements.nvidia_endorsements import GpuEndorsements
from attestation.errors import MalformedEvidence
from attestation.evidence.gpu.document import MAX_DOCUMENT_SIZE, GpuEvidence, read_gpu_document
from attestation.verifier.appraisal import Appraisal, Status
from attestation.verifier.check import Expected
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.profile import GpuProfile
from attestation.verifier.gpu.verify import verify_devices
from attestation.verifier.profile import Profile
from attestation.verifier.snp import verify_snp
from policies.errors import Unusable

CPU: Final = "cpu0"
"""The name of the CPU's part, beside `gpu0`, `gpu1`, …, `switch0`, …"""

_SEVERITY: tuple[Status, ...] = ("none", "contraindicated", "warning", "affirming")


@dataclass(frozen=True, slots=True)
class Devices:
    """The further devices of a guest, what they are judged by, and the nonce with which they must have been asked."""

    evidence: tuple[GpuEvidence, ...]
    profile: GpuProfile
    nonce: bytes
    endorsements: GpuEndorsements = field(default_factory=GpuEndorsements)


@dataclass(frozen=True, slots=True)
class CompositeAppraisal:
    """One verdict for each part.

    Attributes:
        status: The worst of all.
        parts: Each part's appraisal by name, `cpu0` first; an EAR has one submodule for each.
    """

    status: Status
    parts: Mapping[str, Appraisal]

    @property
    def cpu(self) -> Appraisal:
        """The CPU's."""
        return self.parts[CPU]

    @property
    def devices(self) -> Mapping[str, Appraisal]:
        """The further devices'."""
        return {name: part for name, part in self.parts.items() if name != CPU}


def read_additional_evidence(text: str, *, most: int | None = None) -> tuple[GpuEvidence, ...]:
    """The devices in a session's additional evidence: none if it is empty, else those under `nvidia`, at most `most`.

    Raises:
        MalformedEvidence: no JSON object, another kind of device than NVIDIA's, or a device that cannot be read.
    """
    if not text:
        return ()
    try:
        document = read_json_object(text.encode("utf-8"), where="additional evidence", limit=MAX_DOCUMENT_SIZE)
        if set(document) != {"nvidia"} or not isinstance(document["nvidia"], dict | str):
            raise _malformed(f"it holds {sorted(document)}, and not exactly nvidia")
        inner = document["nvidia"]
        raw = inner.encode("utf-8") if isinstance(inner, str) else canonical_bytes(inner)
    except MalformedEvidence:
        raise
    except (Unusable, UnicodeError) as error:
        raise _malformed(error.what if isinstance(error, Unusable) else "it is no UTF-8") from error
    devices = read_gpu_document(raw)
    if most is not None and len(devices) > most:
        raise _malformed(f"it holds {len(devices)} devices, more than {most}")
    return devices


def verify_composite(
    report: bytes,
    endorsements: Endorsements,
    profile: Profile,
    expected: Expected,
    devices: Devices | None,
    at: datetime,
) -> CompositeAppraisal:
    """Appraise a CPU's report and its further devices at the time `at` (aware): one bad part makes the whole bad.

    `expected.report_data` is what binds the devices' evidence to the CPU's.

    Raises:
        MalformedEvidence, MalformedEndorsement: a part cannot be read.
        ValueError: `at` has no time zone.
    """
    parts: dict[str, Appraisal] = {CPU: verify_snp(report, endorsements, profile, expected, at)}
    if devices is not None:
        parts.update(verify_bound_devices(devices, at))
    return CompositeAppraisal(worst_status(list(parts.values())), MappingProxyType(parts))


def verify_bound_devices(devices: Devices, at: datetime) -> Mapping[str, Appraisal]:
    """The further devices' appraisals by name. Raises MalformedEvidence, MalformedEndorsement."""
    return verify_devices(
        devices.evidence,
        devices.profile,
        GpuExpected(nonce=devices.nonce),
        rims=devices.endorsements.rims,
        revocation=devices.endorsements.revocation,
        at=at,
    ).devices


def worst_status(parts: Sequence[Appraisal]) -> Status:
    """The status of the whole: the worst of its parts, of which there is one at least."""
    return next(one for one in _SEVERITY if any(part.status == one for part in parts))


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(
        what, where="additional evidence", do='Send "" or the JSON text {"nvidia": {"device_evidence_list": […]}}.'
    )
