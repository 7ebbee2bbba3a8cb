"""A UNIX socket for a library that dials for itself (grpcio): each connection to it is carried by one that we dial."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fl.errors import PeerLost

_PIPE: Final = 1 << 20
_SPLICE_MOVE: Final = 1


class Relay:
    """A private UNIX socket at `path`. `close` ends it and what it carries."""

    def __init__(self, dial: Callable[[], socket.socket]) -> None:
        self._dial = dial
        self._folder = tempfile.TemporaryDirectory(prefix="sealwright-relay-")
        self.path = str(Path(self._folder.name) / "socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._lock = threading.Lock()
        self._open: set[socket.socket] | None = set()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        """End it."""
        with self._lock:
            carried, self._open = self._open or set(), None
        for one in carried:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), name="relay", daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            try:
                far = self._dial()
            except PeerLost:
                return  # who dials sees its connection end
            with far:
                near.settimeout(None)
                far.settimeout(None)
                with self._lock:
                    if self._open is None:
                        return
                    self._open |= {near, far}
                back = threading.Thread(target=_move, args=(far, near), name="relay", daemon=True)
                back.start()
                _move(near, far)
                back.join()
                with self._lock:
                    if self._open is not None:
                        self._open -= {near, far}


def _move(source: socket.socket, target: socket.socket) -> None:
    """Move bytes until the source ends, or either is gone."""
    out, into = os.pipe2(os.O_CLOEXEC)
    try:
        while held := os.splice(source.fileno(), into, _PIPE, flags=_SPLICE_MOVE):
            while held:
                held -= os.splice(out, target.fileno(), held, flags=_SPLICE_MOVE)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(out)
        os.close(into)
