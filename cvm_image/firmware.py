"""A generated firmware blob with the SEV metadata of OVMF's AmdSev build.

The virtual platform measures firmware exactly as a secure processor does, so the blob has everything that the launch
measurement reads: the GUIDed footer table, the SEV metadata sections, the place of the kernel hash table and the
SEV-ES reset block, at the addresses of edk2's OvmfPkg/AmdSev/AmdSevX64.fdf. It holds no code but a halt at the reset
vector: nothing is booted from it, and a machine that tried would stop at once.
"""

from __future__ import annotations

import struct
import uuid

from attestation.evidence.launch import PAGE

FIRMWARE_SIZE = 16 * PAGE

HASH_TABLE = (0x80CC00, 0x400)
"""Guest address and size of the table with the digests of kernel, initrd and command line (PcdQemuHashTableBase)."""
LAUNCH_SECRET = (0x80C000, 0xC00)
RESET_ADDRESS = 0x80B004

SECTIONS: tuple[tuple[int, int, int], ...] = (
    (0x800000, 0x9000, 0x01),  # SNP_SEC_MEM: page tables
    (0x809000, 0x3000, 0x01),  # SNP_SEC_MEM: GHCB and work area
    (0x80D000, 0x1000, 0x02),  # SNP_SECRETS
    (0x80E000, 0x1000, 0x03),  # CPUID
    (0x80F000, 0x1000, 0x04),  # SVSM_CAA
    (0x810000, 0x10000, 0x01),  # SNP_SEC_MEM: stack and heap of the security phase
    (0x80C000, 0x1000, 0x10),  # SNP_KERNEL_HASHES
)
"""Address, size and type of each range that the metadata describe, in the order in which they are measured."""

_FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
_SEV_METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
_RESET_BLOCK = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
_INJECTION_BLOCK = "4c2eb361-7d9b-4cc3-8081-127c90d3d294"
_HASH_TABLE_BLOCK = "7255371f-3a3b-4b04-927b-1da6efa8d454"

_RESET_VECTOR = b"\xfa\xf4\xeb\xfd".ljust(16, b"\x90")
"""cli; hlt; jmp back to the hlt."""


def generate_firmware(title: bytes = b"Sealwright generated firmware: measured, never executed\n") -> bytes:
    """Return the blob: `FIRMWARE_SIZE` bytes, the same every time for the same `title` (its readable first bytes)."""
    metadata = b"".join(struct.pack("<III", *section) for section in SECTIONS)
    metadata = struct.pack("<4sIII", b"ASEV", 16 + len(metadata), 1, len(SECTIONS)) + metadata
    metadata_from_end = PAGE
    table = b"".join(
        _entry(guid, data)
        for guid, data in (
            (_SEV_METADATA, struct.pack("<I", metadata_from_end)),
            (_HASH_TABLE_BLOCK, struct.pack("<II", *HASH_TABLE)),
            (_INJECTION_BLOCK, struct.pack("<II", *LAUNCH_SECRET)),
            (_RESET_BLOCK, struct.pack("<I", RESET_ADDRESS)),
        )
    )
    table += struct.pack("<H", len(table) + 18) + uuid.UUID(_FOOTER).bytes_le
    tail = table + bytes(16) + _RESET_VECTOR
    last_page = metadata + bytes(PAGE - len(metadata) - len(tail)) + tail
    return title.ljust(FIRMWARE_SIZE - PAGE, b"\x00") + last_page


def _entry(guid: str, data: bytes) -> bytes:
    """Return one table entry: data, then the length of the whole, then the GUID (it is read backwards)."""
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le
