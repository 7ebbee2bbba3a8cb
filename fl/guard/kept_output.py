"""What a sandboxed script has printed, within a bound: its head, and its end, where tracebacks stand."""

from __future__ import annotations


class KeptOutput:
    """At most `limit` bytes of a stream of any length. For one thread at a time."""

    def __init__(self, limit: int) -> None:
        self._tail_bytes = limit // 4
        self._head_bytes = limit - self._tail_bytes
        self._head = bytearray()
        self._tail = bytearray()
        self.truncated = False
        """Whether something between head and end was thrown away."""

    def take(self, piece: bytes) -> None:
        """Take what came next."""
        room = self._head_bytes - len(self._head)
        self._head += piece[:room]
        self._tail += piece[room:]
        excess = len(self._tail) - self._tail_bytes
        if excess > 0:
            del self._tail[:excess]
            self.truncated = True

    def __bytes__(self) -> bytes:
        return bytes(self._head + self._tail)
