"""The hardware attester against configfs folders and an ioctl that behave as the kernel's, and as a hostile host's."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from attestation.attester.hardware import SNP_GET_EXT_REPORT, ConfigfsReport, SevGuestDevice, open_hardware
from attestation.errors import AttesterUnavailable
from attestation.evidence.report import REPORT_SIZE

REPORT = bytes(range(256)) * 4 + bytes(160)
DATA = b"d" * 64


class Configfs(ConfigfsReport):
    """Plays the kernel: it fills a request's folder before it is read, and empties it before it is removed."""

    def __init__(self, folder: Path, *, provider: str = "sev_guest", report: bytes = REPORT, jump: int = 1) -> None:
        super().__init__(folder)
        self.provider, self.report, self.jump = provider, report, jump
        self.requests: list[bytes] = []

    def _read(self, entry: Path, report_data: bytes) -> object:  # type: ignore[override]  # the kernel's side of it
        (entry / "provider").write_text(f"{self.provider}\n")
        (entry / "generation").write_text("0\n")
        (entry / "outblob").write_bytes(self.report)
        (entry / "auxblob").write_bytes(b"table")
        (entry / "inblob").write_bytes(b"")
        kernel = _CountingFolder(entry, self.jump)
        try:
            return super()._read(kernel, report_data)  # type: ignore[arg-type]  # a folder whose counter moves
        finally:
            self.requests.append((entry / "inblob").read_bytes())
            for path in entry.iterdir():
                path.unlink()


class _CountingFolder:
    """A request's folder whose generation rises with each write to inblob, by more than one if another writes too."""

    def __init__(self, entry: Path, jump: int) -> None:
        self._entry, self._jump, self._reads = entry, jump, 0

    def __truediv__(self, name: str) -> Path:
        if name == "generation":
            if self._reads:
                (self._entry / name).write_text(f"{self._jump}\n")
            self._reads += 1
        return self._entry / name

    def __str__(self) -> str:
        return str(self._entry)


def test_configfs_gives_report_and_table_and_leaves_nothing_behind(tmp_path: Path) -> None:
    attester = Configfs(tmp_path)
    evidence = attester.evidence(DATA)
    assert (evidence.report, evidence.certificates) == (REPORT, b"table")
    assert attester.requests == [DATA]
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_noticed_by_the_generation(tmp_path: Path) -> None:
    attester = Configfs(tmp_path, jump=2)
    with pytest.raises(AttesterUnavailable, match="another process wrote"):
        attester.evidence(DATA)
    assert len(attester.requests) == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attester", "words"),
    [
        (lambda folder: Configfs(folder, provider="tdx_guest"), "tdx_guest"),
        (lambda folder: Configfs(folder, report=REPORT[:-1]), "1183 bytes"),
        (lambda folder: Configfs(folder, report=REPORT + b"x"), "larger than"),
        (lambda folder: ConfigfsReport(folder / "none"), "no such file"),
    ],
)
def test_configfs_that_gives_something_else_is_refused(
    tmp_path: Path, attester: Callable[[Path], ConfigfsReport], words: str
) -> None:
    with pytest.raises(AttesterUnavailable, match=words):
        attester(tmp_path).evidence(DATA)
    assert list(tmp_path.iterdir()) == []


class Device:
    """Plays /dev/sev-guest: checks the request's layout and answers as told, one answer for each call."""

    def __init__(self, *answers: Callable[[Device, int, int, ctypes.Array[ctypes.c_char]], None]) -> None:
        self.answers = list(answers)
        self.sizes: list[int] = []
        self.user_data: list[bytes] = []
        self.slept: list[float] = []

    def ioctl(self, descriptor: int, request: int, wrapper: ctypes.Array[ctypes.c_char]) -> int:
        assert request == SNP_GET_EXT_REPORT
        assert len(wrapper) == 32
        version, request_address, response_address, errors = struct.unpack("<B7xQQQ", wrapper.raw)
        assert (version, errors) == (1, 0)
        user_data, vmpl, address, size = struct.unpack("<64sI28xQI4x", ctypes.string_at(request_address, 112))
        assert vmpl == 0
        assert size % 4096 == 0
        assert address
        self.sizes.append(size)
        self.user_data.append(user_data)
        self.address = address
        self.answers.pop(0)(self, request_address, response_address, wrapper)
        return 0


def report(status: int = 0, size: int = REPORT_SIZE) -> Callable[..., None]:
    def answer(device: Device, request: int, response: int, wrapper: ctypes.Array[ctypes.c_char]) -> None:
        ctypes.memmove(response, struct.pack("<II24x", status, size) + REPORT, 0x20 + REPORT_SIZE)
        ctypes.memmove(device.address, b"table", 5)

    return answer


def failure(vmm_error: int, firmware_error: int = 0, needed: int | None = None) -> Callable[..., None]:
    def answer(device: Device, request: int, response: int, wrapper: ctypes.Array[ctypes.c_char]) -> None:
        struct.pack_into("<II", wrapper, 24, firmware_error, vmm_error)
        if needed is not None:
            ctypes.memmove(request + 104, struct.pack("<I", needed), 4)
        raise OSError(errno.EIO, "I/O error")

    return answer


def ask(device: Device, path: Path) -> object:
    path.write_bytes(b"")
    return SevGuestDevice(path, ioctl=device.ioctl, sleep=device.slept.append).evidence(DATA)


def test_the_device_gives_report_and_table(tmp_path: Path) -> None:
    device = Device(report())
    evidence = ask(device, tmp_path / "sev-guest")
    assert evidence.report == REPORT  # type: ignore[attr-defined]  # SnpEvidence
    assert evidence.certificates.rstrip(b"\0") == b"table"  # type: ignore[attr-defined]  # SnpEvidence
    assert device.user_data == [DATA]


def test_a_larger_table_is_asked_for_again_with_room(tmp_path: Path) -> None:
    device = Device(failure(1, needed=20_000), report())
    ask(device, tmp_path / "sev-guest")
    assert device.sizes == [16384, 20480]


def test_a_busy_host_is_asked_again_a_bounded_number_of_times(tmp_path: Path) -> None:
    device = Device(failure(2), failure(2), report())
    ask(device, tmp_path / "sev-guest")
    assert device.slept == [1.0, 1.0]
    endless = Device(*[failure(2)] * 10)
    with pytest.raises(AttesterUnavailable, match="busy over 5 tries"):
        ask(endless, tmp_path / "sev-guest")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (failure(0, firmware_error=0x16), "firmware error 0x16"),
        (failure(1, needed=1 << 30), "VMM error 0x1"),
        (failure(1, needed=100), "VMM error 0x1"),
        (report(status=0x16), "status 0x16"),
        (report(size=4000), "4000 bytes"),
    ],
)
def test_what_the_device_refuses_is_said(tmp_path: Path, answer: Callable[..., None], words: str) -> None:
    with pytest.raises(AttesterUnavailable, match=words):
        ask(Device(answer), tmp_path / "sev-guest")


def test_a_missing_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(AttesterUnavailable, match="no such file"):
        SevGuestDevice(tmp_path / "none").evidence(DATA)
    with pytest.raises(AttesterUnavailable, match="no SEV-SNP secure processor"):
        open_hardware(tmp_path / "none", tmp_path / "none")


def test_configfs_comes_before_the_device(tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(b"")
    assert isinstance(open_hardware(tmp_path / "none", tmp_path / "device"), SevGuestDevice)
    assert isinstance(open_hardware(tmp_path, tmp_path / "device"), ConfigfsReport)


def test_this_processes_real_ioctl_is_refused_by_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AttesterUnavailable, match="no report"):
        SevGuestDevice(tmp_path / "file").evidence(DATA)
