"""The SEV-SNP ATTESTATION_REPORT: 1184 bytes to a frozen object and back.

Layout: AMD publication 56860, table "ATTESTATION_REPORT structure", versions 2 to 5; integers are little-endian.
Nothing here is believed: a parsed report is a claim until the verifier has checked its signature over `Report.signed`,
the very bytes that were parsed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from attestation.errors import MalformedEvidence

REPORT_SIZE = 0x4A0
"""Bytes in a report, in every version."""

SIGNED_SIZE = 0x2A0
"""The signature covers this many bytes from the start."""

VERSIONS = frozenset({2, 3, 4, 5})
"""Layouts known here. Version 4 is laid out as version 3."""

SIGNATURE_ALGORITHM_ECDSA_P384_SHA384 = 1

SIGNING_KEY_VCEK = 0
SIGNING_KEY_VLEK = 1
SIGNING_KEY_NONE = 7


class Product(Enum):
    """Product lines that have a root key of their own. Bergamo and Siena belong to Genoa's line."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"


@dataclass(frozen=True, slots=True)
class Report:
    """One ATTESTATION_REPORT; field names are the ABI's.

    `current_tcb`, `reported_tcb`, `committed_tcb` and `launch_tcb` are 8 raw bytes: their layout depends on the product
    (`attestation.evidence.tcb.decode_tcb`). `cpuid_*` are None before version 3, the mitigation vectors before 5.
    `raw` holds the bytes the object was parsed from, and is empty in an object that was built field by field.
    """

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_fam_id: int | None
    cpuid_mod_id: int | None
    cpuid_step: int | None
    chip_id: bytes
    committed_tcb: bytes
    current_build: int
    current_minor: int
    current_major: int
    committed_build: int
    committed_minor: int
    committed_major: int
    launch_tcb: bytes
    launch_mit_vector: int | None
    current_mit_vector: int | None
    signature_r: int
    signature_s: int
    raw: bytes = b""

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers, as they were received."""
        return self.raw[:SIGNED_SIZE]

    @property
    def author_key_enabled(self) -> bool:
        """KEY_INFO bit 0: AUTHOR_KEY_DIGEST means something."""
        return bool(self.key_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """KEY_INFO bit 1: the host had the firmware withhold the signature."""
        return bool(self.key_info & 2)

    @property
    def signing_key(self) -> int:
        """KEY_INFO bits 4:2: 0 VCEK, 1 VLEK, 7 none; others are reserved."""
        return (self.key_info >> 2) & 7


# Names stand beside their formats so that the two cannot drift apart; "x" bytes are reserved.
_LAYOUT = struct.Struct(
    "<I"  # 0x000 VERSION
    "I"  # 0x004 GUEST_SVN
    "Q"  # 0x008 POLICY
    "16s"  # 0x010 FAMILY_ID
    "16s"  # 0x020 IMAGE_ID
    "I"  # 0x030 VMPL
    "I"  # 0x034 SIGNATURE_ALGO
    "8s"  # 0x038 CURRENT_TCB
    "Q"  # 0x040 PLATFORM_INFO
    "I"  # 0x048 KEY_INFO
    "4x"
    "64s"  # 0x050 REPORT_DATA
    "48s"  # 0x090 MEASUREMENT
    "32s"  # 0x0C0 HOST_DATA
    "48s"  # 0x0E0 ID_KEY_DIGEST
    "48s"  # 0x110 AUTHOR_KEY_DIGEST
    "32s"  # 0x140 REPORT_ID
    "32s"  # 0x160 REPORT_ID_MA
    "8s"  # 0x180 REPORTED_TCB
    "B"  # 0x188 CPUID_FAM_ID (version 3)
    "B"  # 0x189 CPUID_MOD_ID (version 3)
    "B"  # 0x18A CPUID_STEP (version 3)
    "21x"
    "64s"  # 0x1A0 CHIP_ID
    "8s"  # 0x1E0 COMMITTED_TCB
    "BBB"  # 0x1E8 CURRENT_BUILD, CURRENT_MINOR, CURRENT_MAJOR
    "x"
    "BBB"  # 0x1EC COMMITTED_BUILD, COMMITTED_MINOR, COMMITTED_MAJOR
    "x"
    "8s"  # 0x1F0 LAUNCH_TCB
    "Q"  # 0x1F8 LAUNCH_MIT_VECTOR (version 5)
    "Q"  # 0x200 CURRENT_MIT_VECTOR (version 5)
    "152x"
    "72s"  # 0x2A0 SIGNATURE.R
    "72s"  # 0x2E8 SIGNATURE.S
    "368x"
)

_RESERVED_ALWAYS = (
    (0x04C, 0x050),
    (0x18B, 0x1A0),
    (0x1EB, 0x1EC),
    (0x1EF, 0x1F0),
    (0x208, 0x2A0),
)
_RESERVED_BEFORE_3 = ((0x188, 0x18B),)
_RESERVED_BEFORE_5 = ((0x1F8, 0x208),)

_SIGNATURE_PADDING = ((0x2A0 + 48, 0x2A0 + 72), (0x2E8 + 48, 0x2E8 + 72), (0x330, REPORT_SIZE))


def reserved_ranges(version: int) -> tuple[tuple[int, int], ...]:
    """Byte ranges [start, end) below 0x2A0 that a report of this version keeps zero."""
    ranges: tuple[tuple[int, int], ...] = _RESERVED_ALWAYS
    if version < 3:
        ranges += _RESERVED_BEFORE_3
    if version < 5:
        ranges += _RESERVED_BEFORE_5
    return ranges


def nonzero_reserved(raw: bytes, version: int) -> tuple[int, ...]:
    """Offsets of bytes below 0x2A0 that are reserved in this version and not zero."""
    return _nonzero(raw, reserved_ranges(version))


def nonzero_signature_padding(raw: bytes) -> tuple[int, ...]:
    """Offsets of bytes from 0x2A0 on that pad R, S and the signature, and are not zero.

    No signature covers them, so that anybody on the way could write there.
    """
    return _nonzero(raw, _SIGNATURE_PADDING)


def _nonzero(raw: bytes, ranges: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    found: list[int] = []
    for start, end in ranges:
        part = raw[start:end]
        if part.count(0) != end - start:
            found += [start + index for index, value in enumerate(part) if value]
    return tuple(found)


def parse_report(raw: bytes, *, strict: bool = True) -> Report:
    """Read one report.

    With `strict` an unknown version and any reserved or padding byte that is not zero are refused, and
    `encode_report` gives back the same bytes. Without it they are let through, laid out as the nearest known version,
    so that a verifier can list them among all other failures.

    Raises:
        MalformedEvidence: the length is not 1184 bytes, or (strict) the layout is not one known here.
    """
    if len(raw) != REPORT_SIZE:
        raise MalformedEvidence(
            f"an SEV-SNP report has {REPORT_SIZE} bytes, and this has {len(raw)}",
            where="ATTESTATION_REPORT",
            do="Give the raw report as the firmware made it.",
        )
    fields = _LAYOUT.unpack(raw)
    version: int = fields[0]
    if strict:
        _refuse_unknown(raw, version)
    has_cpuid = version >= 3
    has_mitigations = version >= 5
    values = (
        *fields[:18],
        *(fields[18:21] if has_cpuid else (None, None, None)),
        *fields[21:30],
        *(fields[30:32] if has_mitigations else (None, None)),
        int.from_bytes(fields[32], "little"),
        int.from_bytes(fields[33], "little"),
        raw,
    )
    return Report(*values)


def _refuse_unknown(raw: bytes, version: int) -> None:
    if version not in VERSIONS:
        raise MalformedEvidence(
            f"report version {version} is not known",
            where="ATTESTATION_REPORT, VERSION at 0x000",
            do="Versions 2 to 5 can be read.",
        )
    offsets = nonzero_reserved(raw, version) + nonzero_signature_padding(raw)
    if offsets:
        raise MalformedEvidence(
            f"{len(offsets)} reserved byte(s) are not zero, the first at 0x{offsets[0]:03x}",
            where=f"ATTESTATION_REPORT version {version}",
            do="Give the raw report as the firmware made it.",
        )


def encode_report(report: Report) -> bytes:
    """The 1184 bytes of these fields, reserved bytes zero; `report.raw` is not looked at.

    Raises:
        MalformedEvidence: a field has the wrong size or range, or one that this version lacks is given.
    """
    has_cpuid, has_mitigations = report.version >= 3, report.version >= 5
    cpuid = (report.cpuid_fam_id, report.cpuid_mod_id, report.cpuid_step)
    mitigations = (report.launch_mit_vector, report.current_mit_vector)
    if report.version not in VERSIONS:
        raise _unencodable("VERSION", f"{report.version} is not known")
    if any((value is not None) != has_cpuid for value in cpuid):
        raise _unencodable("CPUID_FAM_ID, CPUID_MOD_ID, CPUID_STEP", "version 3 and later have these, and only they")
    if any((value is not None) != has_mitigations for value in mitigations):
        raise _unencodable("LAUNCH_MIT_VECTOR, CURRENT_MIT_VECTOR", "version 5 has these, and only that")
    for name, size in _SIZES.items():
        if len(getattr(report, name)) != size:
            raise _unencodable(name.upper(), f"it has {size} bytes, not {len(getattr(report, name))}")
    for name, value in (("SIGNATURE.R", report.signature_r), ("SIGNATURE.S", report.signature_s)):
        if not 0 <= value < 1 << 384:
            raise _unencodable(name, "it has 48 bytes at most")
    try:
        return _LAYOUT.pack(
            report.version,
            report.guest_svn,
            report.policy,
            report.family_id,
            report.image_id,
            report.vmpl,
            report.signature_algo,
            report.current_tcb,
            report.platform_info,
            report.key_info,
            report.report_data,
            report.measurement,
            report.host_data,
            report.id_key_digest,
            report.author_key_digest,
            report.report_id,
            report.report_id_ma,
            report.reported_tcb,
            *(value or 0 for value in cpuid),
            report.chip_id,
            report.committed_tcb,
            report.current_build,
            report.current_minor,
            report.current_major,
            report.committed_build,
            report.committed_minor,
            report.committed_major,
            report.launch_tcb,
            *(value or 0 for value in mitigations),
            report.signature_r.to_bytes(72, "little"),
            report.signature_s.to_bytes(72, "little"),
        )
    except struct.error as error:
        raise _unencodable("integer fields", str(error)) from error


_SIZES = {
    "family_id": 16,
    "image_id": 16,
    "current_tcb": 8,
    "report_data": 64,
    "measurement": 48,
    "host_data": 32,
    "id_key_digest": 48,
    "author_key_digest": 48,
    "report_id": 32,
    "report_id_ma": 32,
    "reported_tcb": 8,
    "chip_id": 64,
    "committed_tcb": 8,
    "launch_tcb": 8,
}


def _unencodable(field: str, why: str) -> MalformedEvidence:
    return MalformedEvidence(why, where=f"ATTESTATION_REPORT, {field}", do="Correct the field.")


def product_of(family: int, model: int) -> Product | None:
    """The product line of CPUID's display family and model, or None for a processor not known here.

    Bergamo and Siena (family 0x19, models 0xA0 to 0xAF) are certified by Genoa's root.
    """
    if family == 0x19:
        if model <= 0x0F:
            return Product.MILAN
        if 0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF:
            return Product.GENOA
    elif family == 0x1A and model <= 0x11:
        return Product.TURIN
    return None
