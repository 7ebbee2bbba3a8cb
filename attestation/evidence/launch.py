"""The launch measurement: what the secure processor hashes while a guest is loaded, recomputed from the files.

The digest itself is computed by sev-snp-measure, AMD's and IBM's reference implementation (SEV-SNP firmware ABI 56860,
section 8.17, LAUNCH_UPDATE). This module adds what that library leaves to its caller: it works on bytes in hand rather
than on paths, so that what was measured is what is then run; and it refuses firmware that cannot protect a kernel,
for which the library would silently return a digest or fail in the middle.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sevsnpmeasure import guest, ovmf, sev_hashes, vcpu_types, vmm_types
from sevsnpmeasure.sev_mode import SevMode

from attestation.errors import UnmeasurableImage

PAGE = 4096
MAX_FIRMWARE = 16 << 20
MAX_KERNEL = 128 << 20
MAX_INITRD = 1 << 30
MAX_CMDLINE = 4096
"""Bytes: COMMAND_LINE_SIZE of the x86-64 kernel is 2048; QEMU accepts more. Above this it is no command line."""
MAX_VCPUS = 512

VCPU_MODELS: Mapping[str, int] = MappingProxyType(dict(vcpu_types.CPU_SIGS))
"""QEMU's EPYC models, each with its CPUID signature (it is in the measured initial register state)."""
VMMS: Mapping[str, vmm_types.VMMType] = MappingProxyType({kind.name.lower(): kind for kind in vmm_types.VMMType})
"""Virtual machine monitors whose initial register state is known: `qemu`, `ec2`, `gce`."""

_TABLE_FOOTER = uuid.UUID(ovmf.OVMF.OVMF_TABLE_FOOTER_GUID).bytes_le
_ENTRY = struct.Struct("<H16s")
_SECTION_HEADER = struct.Struct("<4sIII")
_SECTION = struct.Struct("<III")
_MAX_SECTIONS = 64


@dataclass(frozen=True, slots=True)
class Section:
    """One range of guest memory that the firmware's SEV metadata describes (`kind` is OVMF's section type)."""

    address: int
    size: int
    kind: ovmf.SectionType


@dataclass(frozen=True, slots=True)
class FirmwareLayout:
    """What a firmware blob says about its own launch (OVMF's GUIDed table and SEV metadata).

    `sections` in the order in which they are measured; `hash_table` is the guest address of the table with the digests
    of kernel, initrd and command line; `reset_address` is where the processors other than the first begin.
    """

    size: int
    sections: tuple[Section, ...]
    hash_table: int
    reset_address: int


def measure_launch(
    *,
    firmware: bytes,
    kernel: bytes,
    initrd: bytes,
    cmdline: bytes,
    vcpu_model: str = "EPYC-v4",
    vcpus: int = 1,
    vmm: str = "qemu",
    guest_features: int = 0x1,
) -> bytes:
    """Return the 48-byte MEASUREMENT that a SEV-SNP guest launched from these bytes reports.

    `guest_features` is SEV_FEATURES of the initial register state (bit 0, SNP active, is always set on hardware).
    Raises UnmeasurableImage for a firmware without the metadata that binds a kernel, an unknown vCPU model or VMM,
    and sizes out of range.
    """
    if vcpu_model not in VCPU_MODELS:
        raise UnmeasurableImage(
            f"{vcpu_model!r} is no vCPU model that can be measured",
            where="vCPU model",
            do=f"Take one of {', '.join(VCPU_MODELS)}.",
        )
    if vmm not in VMMS:
        raise UnmeasurableImage(f"{vmm!r} is no known VMM", where="VMM", do=f"Take one of {', '.join(VMMS)}.")
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UnmeasurableImage(f"{vcpus} vCPUs are out of range", where="vCPUs", do=f"Take 1 to {MAX_VCPUS}.")
    if not 0 <= guest_features < 1 << 64:
        raise UnmeasurableImage(
            "the guest features are no 64-bit number", where="guest features", do="Give a value like 0x1."
        )
    if not kernel or len(kernel) > MAX_KERNEL:
        raise UnmeasurableImage(
            f"a kernel of {len(kernel)} bytes cannot be measured",
            where="kernel",
            do="Give the kernel that the guest boots.",
        )
    if len(initrd) > MAX_INITRD:
        raise UnmeasurableImage(
            f"an initrd of {len(initrd)} bytes is too large", where="initrd", do=f"At most {MAX_INITRD} bytes."
        )
    layout = read_firmware(firmware)
    if layout.reset_address == 0 and vcpus > 1:
        raise UnmeasurableImage(
            "the firmware names no start address for the second vCPU",
            where="firmware",
            do="Use firmware built for SEV-ES and SEV-SNP.",
        )
    text = command_line(cmdline)
    with _as_path(firmware) as firmware_path, _as_path(kernel) as kernel_path, _as_path(initrd) as initrd_path:
        digest: bytes = guest.calc_launch_digest(
            SevMode.SEV_SNP,
            vcpus,
            VCPU_MODELS[vcpu_model],
            firmware_path,
            kernel_path,
            initrd_path,
            text,
            guest_features,
            vmm_type=VMMS[vmm],
        )
    return digest


def kernel_hash_table(*, kernel: bytes, initrd: bytes, cmdline: bytes) -> bytes:
    """Return the 176-byte table of SHA-256 digests that QEMU places at `FirmwareLayout.hash_table`."""
    with _as_path(kernel) as kernel_path, _as_path(initrd) as initrd_path:
        table: bytes = sev_hashes.SevHashes(kernel_path, initrd_path, command_line(cmdline)).construct_table()
    return table


def command_line(raw: bytes) -> str:
    """Return the kernel command line in `raw`; raise UnmeasurableImage unless it is one line of printable ASCII.

    QEMU hashes the line with its closing NUL, so a NUL, a line break or another encoding inside would make what is
    measured differ from what a person reads in the file.
    """
    if len(raw) > MAX_CMDLINE:
        raise UnmeasurableImage(
            f"a command line of {len(raw)} bytes is too long", where="cmdline", do=f"At most {MAX_CMDLINE} bytes."
        )
    if any(not 0x20 <= byte < 0x7F for byte in raw):
        raise UnmeasurableImage(
            "the command line is not one line of printable ASCII",
            where="cmdline",
            do="Remove line breaks and other characters.",
        )
    return raw.decode("ascii")


def read_firmware(blob: bytes) -> FirmwareLayout:
    """Read the footer table and SEV metadata of an OVMF-style `blob`, strictly.

    Raises UnmeasurableImage if the blob is not whole pages, if a table runs out of its bounds, if sections overlap or
    are not pages, or if there is no SNP_KERNEL_HASHES section that holds the hash table: such firmware would boot any
    kernel, and its measurement says nothing about one.
    """
    if not blob or len(blob) % PAGE or len(blob) > MAX_FIRMWARE:
        raise _bad_firmware(f"its {len(blob)} bytes are not 1 to {MAX_FIRMWARE // PAGE} whole pages of {PAGE}")
    table = _footer_table(blob)
    entry = table.get(ovmf.OVMF.SEV_HASH_TABLE_RV_GUID, b"")
    hash_table, hash_table_size = struct.unpack("<II", entry) if len(entry) == 8 else (0, 0)
    sections = _metadata_sections(blob, table)
    homes = [section for section in sections if section.kind is ovmf.SectionType.SNP_KERNEL_HASHES]
    if len(homes) != 1 or not hash_table:
        raise _bad_firmware("it holds no place for the digests of kernel, initrd and command line (SNP_KERNEL_HASHES)")
    needed = max(hash_table_size, 176)
    if homes[0].size != PAGE or not homes[0].address <= hash_table <= homes[0].address + PAGE - needed:
        raise _bad_firmware("its kernel hash table lies outside the page that is measured for it")
    reset = table.get(ovmf.OVMF.SEV_ES_RESET_BLOCK_GUID, b"")
    if len(reset) != 4:
        raise _bad_firmware("it has no SEV-ES reset block")
    return FirmwareLayout(len(blob), sections, hash_table, int.from_bytes(reset, "little"))


def _footer_table(blob: bytes) -> dict[str, bytes]:
    """Return GUID → data of the table that ends 32 bytes before the blob does (OVMF, ResetVectorVtf0.asm)."""
    end = len(blob) - 32
    size, guid = _ENTRY.unpack_from(blob, end - _ENTRY.size)
    if guid != _TABLE_FOOTER:
        raise _bad_firmware("it has no GUIDed table at its end, hence no SEV metadata")
    if not _ENTRY.size <= size <= end:
        raise _bad_firmware("its GUIDed table is larger than itself")
    table: dict[str, bytes] = {}
    start, cursor = end - size, end - _ENTRY.size
    while cursor > start:
        if cursor - start < _ENTRY.size:
            raise _bad_firmware("its GUIDed table does not divide into entries")
        length, guid = _ENTRY.unpack_from(blob, cursor - _ENTRY.size)
        if not _ENTRY.size <= length <= cursor - start:
            raise _bad_firmware("an entry of its GUIDed table runs out of the table")
        name = str(uuid.UUID(bytes_le=guid))
        if name in table:
            raise _bad_firmware(f"its GUIDed table names {name} twice")
        table[name] = blob[cursor - length : cursor - _ENTRY.size]
        cursor -= length
    return table


def _metadata_sections(blob: bytes, table: Mapping[str, bytes]) -> tuple[Section, ...]:
    """Return the sections of OVMF's SEV metadata (OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm)."""
    entry = table.get(ovmf.OVMF.OVMF_SEV_META_DATA_GUID, b"")
    if len(entry) != 4:
        raise _bad_firmware("it has no SEV metadata")
    start = len(blob) - int.from_bytes(entry, "little")
    if not 0 <= start <= len(blob) - _SECTION_HEADER.size:
        raise _bad_firmware("its SEV metadata lie outside it")
    signature, size, version, count = _SECTION_HEADER.unpack_from(blob, start)
    if signature != b"ASEV" or version != 1:
        raise _bad_firmware("its SEV metadata are not of version 1")
    if count > _MAX_SECTIONS or size != _SECTION_HEADER.size + count * _SECTION.size or start + size > len(blob):
        raise _bad_firmware("the length and the number of its SEV metadata sections disagree")
    sections: list[Section] = []
    for index in range(count):
        address, length, kind = _SECTION.unpack_from(blob, start + _SECTION_HEADER.size + index * _SECTION.size)
        try:
            section = Section(address, length, ovmf.SectionType(kind))
        except ValueError:
            raise _bad_firmware(f"it has a metadata section of the unknown type {kind:#x}") from None
        if address % PAGE or length % PAGE or not length or address + length > ovmf.FOUR_GB - len(blob):
            raise _bad_firmware(f"its metadata section at {address:#x} is not a range of pages below the firmware")
        sections.append(section)
    for lower, upper in zip(
        ordered := sorted(sections, key=lambda section: section.address), ordered[1:], strict=False
    ):
        if lower.address + lower.size > upper.address:
            raise _bad_firmware(f"its metadata sections overlap at {upper.address:#x}")
    return tuple(sections)


def _bad_firmware(what: str) -> UnmeasurableImage:
    return UnmeasurableImage(
        f"the firmware cannot be measured: {what}",
        where="firmware",
        do="Use an OVMF build for AmdSev (OVMF.amdsev.fd).",
    )


@contextlib.contextmanager
def _as_path(data: bytes) -> Iterator[str]:
    """Yield a path under which a library that opens files reads exactly `data` (an anonymous file in memory)."""
    descriptor = os.memfd_create("measured")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
