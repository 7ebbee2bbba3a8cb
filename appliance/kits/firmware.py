"""What firmware a SEV-SNP host runs, as its kernel tells: SNP_PLATFORM_STATUS through /dev/sev.

Source: Linux, include/uapi/linux/psp-sev.h (sev_issue_cmd, sev_user_data_snp_status). The structures are packed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attestation.evidence.report import Product
from attestation.evidence.tcb import Tcb, decode_tcb

DEVICE: Final = Path("/dev/sev")
SNP_PLATFORM_STATUS: Final = 9
_ISSUE_COMMAND: Final = 0xC010_5300
"""_IOWR('S', 0x0, struct sev_issue_cmd), 16 bytes."""
_COMMAND: Final = struct.Struct("<IQI")
_STATUS: Final = struct.Struct("<BBBBIII8s8s")
_INITIALISED: Final = 1


@dataclass(frozen=True, slots=True)
class PlatformStatus:
    """The firmware's version, whether SNP is up with its RMP, and the TCB that reports name."""

    api: tuple[int, int, int]
    running: bool
    rmp: bool
    reported_tcb: bytes

    def tcb(self, product: Product) -> Tcb:
        """The reported TCB, part by part."""
        return decode_tcb(self.reported_tcb, product, strict=False)


def parse_status(raw: bytes) -> PlatformStatus:
    """Read the 32 bytes of `sev_user_data_snp_status`. Raises ValueError for another length."""
    if len(raw) != _STATUS.size:
        raise ValueError(f"an SNP status has {_STATUS.size} bytes, not {len(raw)}")
    major, minor, state, flags, build, _, _, _, reported = _STATUS.unpack(raw)
    return PlatformStatus((major, minor, build), state == _INITIALISED, bool(flags & 1), reported)


def read_status(device: Path = DEVICE) -> PlatformStatus:
    """Ask the running firmware. Raises OSError if there is none, or it does not answer."""
    status = ctypes.create_string_buffer(_STATUS.size)
    command = bytearray(_COMMAND.pack(SNP_PLATFORM_STATUS, ctypes.addressof(status), 0))
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _ISSUE_COMMAND, command)
    finally:
        os.close(descriptor)
    return parse_status(status.raw)


def product_of(family: int, model: int) -> Product | None:
    """The product line of a processor by its CPUID family and model (AMD 56860, "CPUID_FAM_ID" and "CPUID_MOD_ID")."""
    if family == 0x19 and model <= 0x0F:
        return Product.MILAN
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return Product.GENOA
    if family == 0x1A and model <= 0x11:
        return Product.TURIN
    return None


def host_product(cpuinfo: str) -> Product | None:
    """The product line of the first processor in the text of /proc/cpuinfo."""
    first = cpuinfo.split("\n\n", 1)[0]
    facts = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    numbers = {name.strip(): value.strip() for name, value in facts.items()}
    family, model = numbers.get("cpu family", ""), numbers.get("model", "")
    return product_of(int(family), int(model)) if family.isdigit() and model.isdigit() else None
