"""The software secure processor: what it remembers of a launched guest, and the reports that it signs.

It follows the firmware ABI (AMD publication 56860): a guest's measurement, host data and policy are fixed at launch, a
report carries them beside 64 bytes of the guest's choice, and the chip's VCEK signs bytes 0 to 0x29F. What real
firmware would refuse to do can be done here on purpose, so that each check of a verifier has a validly signed report
that fails it and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from attestation.errors import PlatformUnusable
from attestation.evidence.report import SIGNATURE_ALGORITHM_ECDSA_P384_SHA384, SIGNED_SIZE, Report, encode_report
from attestation.evidence.tcb import encode_tcb
from attestation.virtual.chip import Chip

POLICY = 0x30000
"""Guest policy of a guest that permits SMT, and neither debugging nor migration (bit 17 is always one)."""

PLATFORM_INFO = 0x25
"""SMT enabled, ECC memory, alias check complete: what current platforms report."""

NO_MIGRATION_AGENT = b"\xff" * 32


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What the secure processor keeps of one guest from launch to end.

    `overrides` are report fields that are put in place of the true ones, by their names in `Report`: the knob by which
    a validly signed report can violate any one check.
    """

    measurement: bytes
    host_data: bytes
    report_id: bytes
    policy: int = POLICY
    vmpl: int = 0
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    guest_svn: int = 0
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    author_key: bool = False
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def report_for(chip: Chip, context: LaunchContext, report_data: bytes, vmpl: int = 0) -> bytes:
    """Return the signed report of a launched guest over its `report_data` (64 bytes).

    Raises PlatformUnusable if the guest asks for a VMPL more privileged than its own, as the firmware does.
    """
    if not context.vmpl <= vmpl <= 3:
        raise PlatformUnusable(
            f"a guest at VMPL {context.vmpl} may not have a report for VMPL {vmpl}",
            where="report request",
            do="Ask for its own.",
        )
    fields: dict[str, Any] = {
        "policy": context.policy,
        "vmpl": vmpl,
        "family_id": context.family_id,
        "image_id": context.image_id,
        "guest_svn": context.guest_svn,
        "key_info": int(context.author_key),
        "id_key_digest": context.id_key_digest,
        "author_key_digest": context.author_key_digest,
        "measurement": context.measurement,
        "host_data": context.host_data,
        "report_id": context.report_id,
    }
    return sign_report(chip, report_data=report_data, **(fields | dict(context.overrides)))


def sign_report(
    chip: Chip,
    *,
    report_data: bytes = bytes(64),
    patches: Mapping[int, bytes] | None = None,
    unsigned_patches: Mapping[int, bytes] | None = None,
    **fields: Any,
) -> bytes:
    """Return a report of `chip`, validly signed, with any of its `fields` (names as in `Report`) set by the caller.

    What is not set is what an honest platform of this product reports. `version` brings the layout of that version:
    the CPUID fields go before 3, the mitigation vectors before 5. `patches` maps offsets to bytes that are written over
    the report before it is signed (reserved fields, unknown versions), `unsigned_patches` after it.
    """
    version = fields.get("version", chip.report_version)
    tcb = encode_tcb(chip.tcb, chip.product)
    family, model, stepping = chip.cpuid if version >= 3 else (None, None, None)
    major, minor, build = chip.firmware
    honest = Report(
        version=version,
        guest_svn=0,
        policy=POLICY,
        family_id=bytes(16),
        image_id=bytes(16),
        vmpl=0,
        signature_algo=SIGNATURE_ALGORITHM_ECDSA_P384_SHA384,
        current_tcb=tcb,
        platform_info=PLATFORM_INFO,
        key_info=0,
        report_data=report_data,
        measurement=bytes(48),
        host_data=bytes(32),
        id_key_digest=bytes(48),
        author_key_digest=bytes(48),
        report_id=bytes(32),
        report_id_ma=NO_MIGRATION_AGENT,
        reported_tcb=tcb,
        cpuid_fam_id=family,
        cpuid_mod_id=model,
        cpuid_step=stepping,
        chip_id=chip.chip_id,
        committed_tcb=tcb,
        current_build=build,
        current_minor=minor,
        current_major=major,
        committed_build=build,
        committed_minor=minor,
        committed_major=major,
        launch_tcb=tcb,
        launch_mit_vector=0 if version >= 5 else None,
        current_mit_vector=0 if version >= 5 else None,
        signature_r=0,
        signature_s=0,
    )
    raw = bytearray(encode_report(dataclasses.replace(honest, **fields)))
    _write_over(raw, patches)
    signature = chip.key.sign(bytes(raw[:SIGNED_SIZE]), ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    r, s = decode_dss_signature(signature)
    raw[0x2A0:0x2E8] = r.to_bytes(72, "little")
    raw[0x2E8:0x330] = s.to_bytes(72, "little")
    _write_over(raw, unsigned_patches)
    return bytes(raw)


def _write_over(raw: bytearray, patches: Mapping[int, bytes] | None) -> None:
    for offset, data in (patches or {}).items():
        raw[offset : offset + len(data)] = data
