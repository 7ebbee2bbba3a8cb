"""From the UNIX socket that the attester asks to the virtio port that leads to the virtual platform.

Only images for the virtual platform run it. One request at a time: a frame up, a frame down (length, big-endian, and
that many bytes), both bounded.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from pathlib import Path

HEADER = struct.Struct(">I")
MAX_FRAME = 64 * 1024
TIMEOUT_SECONDS = 10.0


def find_port(name: str) -> Path:
    """The device of the virtio port that the host calls `name`. Raises ValueError if there is none."""
    for port in sorted(Path("/sys/class/virtio-ports").glob("vport*")):
        label = port / "name"
        if label.is_file() and label.read_text(errors="replace").strip() == name:
            return Path("/dev") / port.name
    raise ValueError(f"the host attached no virtio port {name}")


class Relay:
    """Serves `path` (0600) and speaks to the port at `device`."""

    def __init__(self, path: Path, device: Path) -> None:
        self._device = device
        self._listening = socket.socket(socket.AF_UNIX)
        os.fchmod(self._listening.fileno(), 0o600)  # what Linux binds has this mode; a umask would be every thread's
        self._listening.bind(str(path))
        self._listening.listen(8)

    def start(self) -> None:
        """Serve from now on, in a thread of its own."""
        threading.Thread(target=self.serve, name="relay", daemon=True).start()

    def serve(self) -> None:
        """Answer connections one after the other, until the socket is closed."""
        port = os.open(self._device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            while True:
                try:
                    connection, _ = self._listening.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(TIMEOUT_SECONDS)
                    try:
                        _pass_one(connection, port)
                    except (OSError, EOFError, ValueError):
                        continue  # whoever asked sees the connection end without an answer, and says so
        finally:
            os.close(port)

    def close(self) -> None:
        """Stop serving."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def _pass_one(connection: socket.socket, port: int) -> None:
    header = _receive(connection, HEADER.size)
    (size,) = HEADER.unpack(header)
    _bounded(size)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    _drain(port)
    _write(port, header + _receive(connection, size), deadline)
    header = _read(port, HEADER.size, deadline)
    (size,) = HEADER.unpack(header)
    _bounded(size)
    connection.sendall(header + _read(port, size, deadline))


def _bounded(size: int) -> None:
    if not 0 < size <= MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _drain(port: int) -> None:
    """Drop what is left of an earlier answer that nobody waited for."""
    while select.select([port], [], [], 0)[0]:
        try:
            if not os.read(port, 4096):
                return
        except BlockingIOError:
            return


def _read(port: int, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([port], [], [], left)[0]:
            raise TimeoutError
        try:
            more = os.read(port, size - len(data))
        except BlockingIOError:
            continue
        if not more:
            time.sleep(0.02)  # nobody is at the other end yet
        data += more
    return data


def _write(port: int, data: bytes, deadline: float) -> None:
    while data:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([], [port], [], left)[1]:
            raise TimeoutError
        try:
            data = data[os.write(port, data) :]
        except BlockingIOError:
            time.sleep(0.02)
