"""The virtual platform's port: report requests over a UNIX socket or a virtio port, and the frames of both ends.

A frame is its length (four bytes, big-endian) and that many bytes of JSON. A request is
`{"report_data": <128 hex digits>, "vmpl": 0}`, an answer `{"report": <base64>, "certificates": <base64>}` or
`{"error": <sentence>}`. Hardware images do not hold this module.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attestation.attester.world import check_report_data
from attestation.errors import AttesterUnavailable
from attestation.evidence.composite import SnpEvidence
from attestation.evidence.report import REPORT_SIZE

MAX_FRAME = 64 * 1024
"""Bytes of a request or an answer."""

HEADER = struct.Struct(">I")


class VirtualPort:
    """An attester that asks the virtual platform at `path`, waiting `timeout` seconds at most for each answer.

    `path` is a UNIX socket (a guest that is a process) or a character device (a virtual machine's virtio port).
    """

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        self._path = path
        self._timeout = timeout

    def evidence(self, report_data: bytes) -> SnpEvidence:
        """Return a report of the virtual chip over `report_data`, with its certificate table."""
        request = {"report_data": check_report_data(report_data).hex(), "vmpl": 0}
        answer = self._ask(json.dumps(request).encode())
        if isinstance(answer.get("error"), str):
            raise AttesterUnavailable(
                f"the virtual platform refused: {answer['error']}", where=str(self._path), do="Start the guest again."
            )
        try:
            evidence = SnpEvidence(
                base64.b64decode(answer["report"], validate=True),
                base64.b64decode(answer["certificates"], validate=True),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._unusable("an answer of another form") from error
        if len(evidence.report) != REPORT_SIZE:
            raise self._unusable("a report of another size")
        return evidence

    def _ask(self, request: bytes) -> Mapping[str, Any]:
        deadline = time.monotonic() + self._timeout
        try:
            with _connected(self._path) as descriptor:
                with contextlib.suppress(BrokenPipeError):  # it closed before it was asked: its answer says why
                    _send(descriptor, HEADER.pack(len(request)) + request, deadline)
                (size,) = HEADER.unpack(_receive(descriptor, HEADER.size, deadline))
                if size > MAX_FRAME:
                    raise self._unusable(f"an answer of {size} bytes")
                answer = json.loads(_receive(descriptor, size, deadline))
        except TimeoutError as error:
            raise self._unusable(f"no answer within {self._timeout:g} seconds") from error
        except (OSError, EOFError) as error:
            raise self._unusable(f"no connection ({error})") from error
        except ValueError as error:
            raise self._unusable("an answer that is no JSON") from error
        if not isinstance(answer, dict):
            raise self._unusable("an answer that is no object")
        return answer

    def _unusable(self, what: str) -> AttesterUnavailable:
        return AttesterUnavailable(
            f"the virtual platform gave {what}", where=str(self._path), do="Start the guest by `seal vm launch`."
        )


def find_virtio_port(name: str, ports: Path = Path("/sys/class/virtio-ports")) -> Path:
    """Return the device of the virtio port that is called `name`, or raise AttesterUnavailable if there is none.

    The kernel's own list is read: the links of /dev/virtio-ports need udev.
    """
    for port in sorted(ports.glob("vport*")):
        with contextlib.suppress(OSError):
            if (port / "name").read_text("ascii").strip() == name:
                return Path("/dev") / port.name
    raise AttesterUnavailable(
        f"there is no virtio port {name!r}", where=str(ports), do="Start the guest on the virtual platform."
    )


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[int]:
    """Yield a descriptor, not blocking, that is connected to the platform."""
    if stat.S_ISCHR(path.stat().st_mode):
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        return
    with socket.socket(socket.AF_UNIX) as connection, short_path(path) as name:
        connection.setblocking(False)
        connection.connect(name)
        yield connection.fileno()


def _send(descriptor: int, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        _wait(descriptor, deadline, writing=True)
        view = view[os.write(descriptor, view) :]


def _receive(descriptor: int, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        _wait(descriptor, deadline, writing=False)
        part = os.read(descriptor, size - len(data))
        if not part:
            raise EOFError("it was closed in the middle of an answer")
        data += part
    return bytes(data)


def _wait(descriptor: int, deadline: float, *, writing: bool) -> None:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT if writing else select.POLLIN)
    if not waiting.poll(remaining * 1000):
        raise TimeoutError


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a name for a UNIX socket that fits in its 108 bytes, however deep its folder lies."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
