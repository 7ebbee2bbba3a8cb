"""Composite evidence as the CoCo Key Broker protocol binds it: a CPU's report, and devices bound to the same session.

The primary report's REPORT_DATA is SHA-384 over the canonical form (RFC 8785) of nonce, key and the additional evidence
as a string; the additional devices are asked with SHA-384 over nonce and key alone, of which a GPU takes 32 bytes. So
the CPU vouches for exactly this evidence of its devices, and each device for this session and key.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha384
from types import MappingProxyType
from typing import Any

from attestation.canonical import canonical_bytes, read_json_object
from attestation.endorsements.chain import Endorsements
from attestation.endorsements.nvidia_revocation import RevocationData
from attestation.errors import MalformedEvidence
from attestation.evidence.gpu.document import MAX_DOCUMENT_SIZE, GpuEvidence, read_gpu_document
from attestation.evidence.gpu.spdm import NONCE_SIZE
from attestation.verifier.appraisal import Appraisal, Status
from attestation.verifier.check import Expected
from attestation.verifier.gpu.check import GpuExpected
from attestation.verifier.gpu.profile import GpuProfile
from attestation.verifier.gpu.verify import verify_devices
from attestation.verifier.profile import Profile
from attestation.verifier.snp import verify_snp
from policies.errors import Unusable

REPORT_DATA_SIZE = 64

_SEVERITY: tuple[Status, ...] = ("none", "contraindicated", "warning", "affirming")


@dataclass(frozen=True, slots=True)
class RuntimeData:
    """What a session binds.

    Attributes:
        nonce: As the broker gave it, text.
        tee_pubkey: The guest's public key, a JWK as it was sent.
        additional_evidence: The additional evidence, text as it was sent; empty if there is none.
    """

    nonce: str
    tee_pubkey: Mapping[str, Any]
    additional_evidence: str = ""

    def report_data(self) -> bytes:
        """The 64 bytes that the primary report must hold. Raises Unusable for a key that is no canonical JSON."""
        document = {
            "additional-evidence": self.additional_evidence,
            "nonce": self.nonce,
            "tee-pubkey": dict(self.tee_pubkey),
        }
        return sha384(canonical_bytes(document)).digest().ljust(REPORT_DATA_SIZE, b"\0")

    def device_nonce(self) -> bytes:
        """The 32 bytes that every additional device must have been asked with."""
        document = {"nonce": self.nonce, "tee-pubkey": dict(self.tee_pubkey)}
        return sha384(canonical_bytes(document)).digest()[:NONCE_SIZE]


@dataclass(frozen=True, slots=True)
class CompositeAppraisal:
    """One verdict for each part: `cpu0`, `gpu0`, …, `switch0`, …

    Attributes:
        status: The worst of all.
        parts: Each part's appraisal; an EAR has one submodule for each.
    """

    status: Status
    parts: Mapping[str, Appraisal]


def read_additional_evidence(text: str) -> tuple[GpuEvidence, ...]:
    """The devices in a session's additional evidence: none if it is empty, else those under `nvidia`.

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
    return read_gpu_document(raw)


def verify_composite(
    report: bytes,
    endorsements: Endorsements,
    runtime: RuntimeData,
    profile: Profile,
    gpu_profile: GpuProfile,
    expected: Expected,
    *,
    rims: Sequence[bytes] = (),
    revocation: RevocationData | None = None,
    at: datetime,
) -> CompositeAppraisal:
    """Appraise a CPU's report and its additional devices, both bound to `runtime`, at the time `at`.

    `expected.report_data`, if it is given, must be what `runtime` gives.

    Raises:
        MalformedEvidence, MalformedEndorsement: a part cannot be read.
        ValueError: `at` has no time zone, or `expected.report_data` contradicts `runtime`.
    """
    bound = runtime.report_data()
    if expected.report_data is not None and not hmac.compare_digest(expected.report_data, bound):
        raise ValueError("the REPORT_DATA expected is not that of the runtime data")
    devices = read_additional_evidence(runtime.additional_evidence)
    wanted = Expected(bound, expected.measurements, expected.host_data, expected.chips)
    parts: dict[str, Appraisal] = {"cpu0": verify_snp(report, endorsements, profile, wanted, at)}
    if devices:
        found = verify_devices(
            devices,
            gpu_profile,
            GpuExpected(nonce=runtime.device_nonce()),
            rims=rims,
            revocation=revocation,
            at=at,
        )
        parts.update(found.devices)
    status = next(one for one in _SEVERITY if any(part.status == one for part in parts.values()))
    return CompositeAppraisal(status, MappingProxyType(parts))


def ear_submods(composite: CompositeAppraisal, policy_id: str) -> dict[str, dict[str, Any]]:
    """The `submods` of an EAR (draft-ietf-rats-ear): status, vector, policy and all claims of each part."""
    return {
        name: {
            "ear.status": part.status,
            "ear.trustworthiness-vector": dict(part.vector),
            "ear.appraisal-policy-id": policy_id,
            "ear.veraison.annotated-evidence": {"snp" if name == "cpu0" else "nvidia": part.claims},
        }
        for name, part in composite.parts.items()
    }


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(
        what, where="additional evidence", do='Send "" or the JSON text {"nvidia": {"device_evidence_list": […]}}.'
    )
