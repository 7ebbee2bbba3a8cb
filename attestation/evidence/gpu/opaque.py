"""NVIDIA's opaque data in a measurement report: typed fields {type 2, length 2, value}, little-endian.

Types and their meanings are those that NVIDIA's attestation software documents for Hopper GPUs and LS10 switches. The
same number can mean different things for the two: 6 is a number for a GPU's VBIOS and text for a switch's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, IntEnum

from attestation.errors import MalformedEvidence

MAX_FIELDS = 64
PDI_SIZE = 8
"""Bytes of a device's public identifier."""


class FieldType(IntEnum):
    """Types that are known here."""

    CERT_ISSUER_NAME = 1
    CERT_AUTHORITY_KEY_IDENTIFIER = 2
    DRIVER_VERSION = 3
    GPU_INFO = 4
    SKU = 5
    VBIOS_VERSION = 6
    MANUFACTURER_ID = 7
    TAMPER_DETECTION = 8
    SMC = 9
    VPR = 10
    NVDEC0_STATUS = 11
    MEASUREMENT_COUNTS = 12
    CPR_INFO = 13
    BOARD_ID = 14
    CHIP_SKU = 15
    CHIP_SKU_MOD = 16
    PROJECT = 17
    PROJECT_SKU = 18
    PROJECT_SKU_MOD = 19
    FWID = 20
    PROTECTED_PCIE_STATUS = 21
    SWITCH_PDI = 22
    FLOORSWEPT_PORTS = 23
    POSITION_ID = 24
    LOCK_SWITCH_STATUS = 25
    SWITCH_GPU_PDI = 26
    GPU_LINK_CONNECTIONS = 32
    SYSTEM_ENABLE_STATUS = 33
    OPAQUE_DATA_VERSION = 34
    CHIP_INFO = 35
    FEATURE_FLAG = 36


NVDEC_ENABLED = 0xAA
NVDEC_DISABLED = 0x55
PCIE_PROTECTED = 0xAA
PCIE_PLAIN = 0x55


class FeatureMode(Enum):
    """FEATURE_FLAG: which confidential mode the device is in."""

    SPT = "spt"
    """Single GPU pass-through."""
    MPT = "mpt"
    """Several GPUs with encrypted links."""
    PPCIE = "ppcie"
    """Several GPUs whose links to switches are not encrypted: the switches belong to what must be trusted."""


FEATURE_FLAGS = {0: FeatureMode.SPT, 1: FeatureMode.MPT, 2: FeatureMode.PPCIE}


@dataclass(frozen=True, slots=True)
class OpaqueField:
    """One field; `kind` need not be a known `FieldType`."""

    kind: int
    value: bytes


def parse_opaque(raw: bytes) -> tuple[OpaqueField, ...]:
    """The fields in their order; unknown types are kept.

    Raises:
        MalformedEvidence: a field outside the data, a type twice, or more than 64 fields.
    """
    fields: list[OpaqueField] = []
    position = 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise _malformed("bytes after the last field")
        kind = int.from_bytes(raw[position : position + 2], "little")
        size = int.from_bytes(raw[position + 2 : position + 4], "little")
        value = raw[position + 4 : position + 4 + size]
        if len(value) != size:
            raise _malformed(f"field {kind} ends outside the data")
        if any(field.kind == kind for field in fields):
            raise _malformed(f"field {kind} twice")
        if len(fields) == MAX_FIELDS:
            raise _malformed(f"more than {MAX_FIELDS} fields")
        fields.append(OpaqueField(kind, value))
        position += 4 + size
    return tuple(fields)


def encode_opaque(fields: tuple[OpaqueField, ...]) -> bytes:
    """The bytes of these fields."""
    return b"".join(
        field.kind.to_bytes(2, "little") + len(field.value).to_bytes(2, "little") + field.value for field in fields
    )


_TEXT = re.compile(rb"([\x21-\x7e]{0,64})\x00*")


def text(value: bytes) -> str:
    """Printable ASCII without blanks, zero-padded. Raises MalformedEvidence."""
    match = _TEXT.fullmatch(value)
    if match is None:
        raise _malformed("a text field holds bytes that are no text")
    return match.group(1).decode("ascii")


def vbios_version(value: bytes) -> str:
    """A VBIOS or switch BIOS version in its written form, for example `96.00.9F.00.01`.

    A GPU gives a 64-bit number (the first four groups in its low half, high byte first), a switch gives text.

    Raises:
        MalformedEvidence: neither form.
    """
    if len(value) == 8 and value[5:] == b"\0\0\0":
        return ".".join(f"{byte:02X}" for byte in (value[3], value[2], value[1], value[0], value[4]))
    written = text(value).upper()
    if not re.fullmatch(r"[0-9A-F]{2}(\.[0-9A-F]{2}){4}", written):
        raise _malformed("the VBIOS version has no form known here")
    return written


def words(value: bytes) -> tuple[int, ...]:
    """32-bit numbers. Raises MalformedEvidence."""
    if len(value) % 4:
        raise _malformed("a field of 32-bit numbers has a broken length")
    return tuple(int.from_bytes(value[start : start + 4], "little") for start in range(0, len(value), 4))


def identifiers(value: bytes) -> tuple[bytes, ...]:
    """Public device identifiers of 8 bytes each, as they stand. Raises MalformedEvidence."""
    if len(value) % PDI_SIZE:
        raise _malformed("a field of device identifiers has a broken length")
    return tuple(value[start : start + PDI_SIZE] for start in range(0, len(value), PDI_SIZE))


def number(value: bytes) -> int:
    """A number of at most 8 bytes. Raises MalformedEvidence."""
    if not 1 <= len(value) <= 8:
        raise _malformed("a number has no or more than 8 bytes")
    return int.from_bytes(value, "little")


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="GPU report: opaque data", do="Give the report as the device made it.")
