"""Evidence from a real secure processor: configfs-tsm where the kernel has it, else the ioctl of /dev/sev-guest.

Sources: Linux, Documentation/ABI/testing/configfs-tsm-report (6.7 and later) and include/uapi/linux/sev-guest.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import struct
import time
from collections.abc import Callable
from pathlib import Path

from attestation.attester.world import Attester, check_report_data
from attestation.errors import AttesterUnavailable
from attestation.evidence.certificate_table import MAX_TABLE_SIZE
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import REPORT_SIZE

CONFIGFS = Path("/sys/kernel/config/tsm/report")
DEVICE = Path("/dev/sev-guest")

SNP_GET_EXT_REPORT = 0xC0205302
"""_IOWR('S', 2, struct snp_guest_request_ioctl), 32 bytes."""

VMM_ERROR_LENGTH = 1
VMM_ERROR_BUSY = 2
_PAGE = 4096
_TRIES = 5
_BUSY_SECONDS = 1.0


def open_hardware(configfs: Path = CONFIGFS, device: Path = DEVICE) -> Attester:
    """Return the attester of this machine. Raises AttesterUnavailable if it is no SEV-SNP guest."""
    if configfs.is_dir():
        return ConfigfsReport(configfs)
    if device.exists():
        return SevGuestDevice(device)
    raise AttesterUnavailable(
        "this machine shows no SEV-SNP secure processor",
        where=f"{configfs}, {device}",
        do="This image runs on SEV-SNP hardware only; check that the host starts it with sev-snp-guest.",
    )


class ConfigfsReport:
    """Reports by configfs-tsm: a folder per request, guarded by its generation counter against a second writer."""

    def __init__(self, folder: Path = CONFIGFS) -> None:
        self._folder = folder

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """Return a report over `report_data`.

        Raises AttesterUnavailable if the kernel gives none, or other processes interfere.
        """
        check_report_data(report_data)
        for _ in range(_TRIES):
            entry = self._folder / f"sealwright-{secrets.token_hex(8)}"
            try:
                entry.mkdir()
                try:
                    evidence = self._read(entry, report_data)
                finally:
                    entry.rmdir()
            except OSError as error:
                raise AttesterUnavailable(
                    f"the kernel gave no report ({os.strerror(error.errno or errno.EIO).lower()})",
                    where=str(self._folder),
                    do="See the kernel's log for sev-guest.",
                ) from error
            if evidence is not None:
                return evidence
        raise AttesterUnavailable(
            f"another process wrote to the report request {_TRIES} times", where=str(self._folder), do="Find out which."
        )

    def _read(self, entry: Path, report_data: bytes) -> SnpEvidence | None:
        """Return the evidence, or None if the generation shows writes that are not ours."""
        provider = (entry / "provider").read_text("ascii").strip()
        if provider != "sev_guest":
            raise AttesterUnavailable(
                f"the kernel's report provider is {provider!r}", where=str(entry), do="This image runs on SEV-SNP only."
            )
        before = int((entry / "generation").read_text("ascii"))
        (entry / "inblob").write_bytes(report_data)
        report = _read_bounded(entry / "outblob", REPORT_SIZE)
        certificates = _read_bounded(entry / "auxblob", MAX_TABLE_SIZE)
        after = int((entry / "generation").read_text("ascii"))
        if after != before + 1:
            return None
        return SnpEvidence(_whole(report), certificates)


class SevGuestDevice:
    """Reports by the ioctl SNP_GET_EXT_REPORT of /dev/sev-guest.

    `ioctl(descriptor, request, wrapper)` takes the place of `fcntl.ioctl`, and `sleep` that of `time.sleep`.
    """

    def __init__(
        self,
        device: Path = DEVICE,
        *,
        ioctl: Callable[[int, int, ctypes.Array[ctypes.c_char]], int] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._device = device
        self._ioctl = ioctl or _ioctl
        self._sleep = sleep

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """Return a report over `report_data` for VMPL 0, with the host's certificates.

        Raises AttesterUnavailable if the device refuses, or stays busy for longer than about five seconds.
        """
        check_report_data(report_data)
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._unavailable(os.strerror(error.errno or errno.EIO).lower()) from error
        try:
            return self._request(descriptor, report_data)
        finally:
            os.close(descriptor)

    def _request(self, descriptor: int, report_data: bytes) -> SnpEvidence:
        size = 4 * _PAGE
        for _ in range(_TRIES):
            certificates = ctypes.create_string_buffer(size)
            # struct snp_ext_report_req: user_data[64], vmpl, rsvd[28], certs_address, certs_len (and padding).
            request = ctypes.create_string_buffer(
                struct.pack("<64sI28xQI4x", report_data, 0, ctypes.addressof(certificates), size), 112
            )
            response = ctypes.create_string_buffer(4000)
            # struct snp_guest_request_ioctl: msg_version (and padding), req_data, resp_data, exitinfo2.
            wrapper = ctypes.create_string_buffer(
                struct.pack("<B7xQQQ", 1, ctypes.addressof(request), ctypes.addressof(response), 0), 32
            )
            reason = "input/output error"
            try:
                self._ioctl(descriptor, SNP_GET_EXT_REPORT, wrapper)
            except OSError as error:
                reason = os.strerror(error.errno or errno.EIO).lower()
                firmware_error, vmm_error = struct.unpack_from("<II", wrapper, 24)
                if vmm_error == VMM_ERROR_BUSY:
                    self._sleep(_BUSY_SECONDS)
                    continue
                needed = struct.unpack_from("<I", request, 104)[0]
                if vmm_error == VMM_ERROR_LENGTH and size < needed <= MAX_TABLE_SIZE:
                    size = (needed + _PAGE - 1) // _PAGE * _PAGE
                    continue
                detail = f"{reason}, firmware error {firmware_error:#x}, VMM error {vmm_error:#x}"
                raise self._unavailable(detail) from error
            status, length = struct.unpack_from("<II", response, 0)
            if status or length != REPORT_SIZE:
                raise self._unavailable(f"status {status:#x}, {length} bytes")
            return SnpEvidence(response.raw[0x20 : 0x20 + REPORT_SIZE], certificates.raw)
        raise self._unavailable(f"it stayed busy over {_TRIES} tries")

    def _unavailable(self, detail: str) -> AttesterUnavailable:
        return AttesterUnavailable(
            f"the secure processor gave no report ({detail})",
            where=str(self._device),
            do="See the kernel's log for sev-guest.",
        )


def _ioctl(descriptor: int, request: int, wrapper: ctypes.Array[ctypes.c_char]) -> int:
    return int(fcntl.ioctl(descriptor, request, wrapper))


def _read_bounded(path: Path, limit: int) -> bytes:
    with contextlib.closing(path.open("rb", buffering=0)) as file:
        data = bytearray()
        while len(data) <= limit and (part := file.read(limit + 1 - len(data))):
            data += part
    if len(data) > limit:
        raise AttesterUnavailable(
            f"{path.name} is larger than {limit} bytes", where=str(path), do="See the kernel's log."
        )
    return bytes(data)


def _whole(report: bytes) -> bytes:
    if len(report) != REPORT_SIZE:
        raise AttesterUnavailable(
            f"the kernel gave a report of {len(report)} bytes",
            where="outblob",
            do="See the kernel's log for sev-guest.",
        )
    return report
