"""Requests that come in pieces: bounded in size, number and time, resumable by offset. No I/O.

An upload is named by its ticket and by the SHA-256 of what it will be, so that a piece that is sent again changes
nothing. What is here is not known to be anybody's until it is whole and opened.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

IDLE_SECONDS: Final = 600.0
"""An upload of which no piece comes for so long is dropped."""


class PieceRefused(Exception):
    """A piece that does not fit: `offset` is where the upload goes on, None if there is no upload to go on with."""

    def __init__(self, why: str, offset: int | None) -> None:
        super().__init__(why)
        self.offset = offset


@dataclass(slots=True)
class _Upload:
    digest: str
    length: int
    touched: float
    content: bytearray = field(default_factory=bytearray)


class Uploads:
    """The uploads at one gateway: `most_bytes` in all; the one that has waited longest goes first."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._open: OrderedDict[str, _Upload] = OrderedDict()

    @property
    def held(self) -> int:
        """Bytes of all pieces that are held."""
        return sum(len(one.content) for one in self._open.values())

    def offset(self, ticket: str, digest: str) -> int:
        """Where this upload goes on; 0 if nothing of it is here."""
        found = self._open.get(ticket)
        return len(found.content) if found is not None and found.digest == digest else 0

    def put(self, ticket: str, digest: str, length: int, offset: int, piece: bytes, now: float) -> bytes | int:
        """Take a piece: the whole, once it is there (and forgotten here), else where the next piece begins.

        Raises PieceRefused if it does not begin where the last one ended, or the whole is not what it was named.
        """
        self._sweep(now)
        found = self._open.get(ticket)
        if found is None or found.digest != digest or found.length != length:
            if offset:
                raise PieceRefused("nothing of this upload is here", 0)
            found = self._open[ticket] = _Upload(digest, length, now)
        at = len(found.content)
        if offset != at or at + len(piece) > length or not piece:
            raise PieceRefused(f"the next piece begins at {at}, and the whole has {length} bytes", at)
        self._open.move_to_end(ticket)
        found.touched = now
        found.content += piece
        self._make_room(ticket)
        if len(found.content) < length:
            return len(found.content)
        del self._open[ticket]
        whole = bytes(found.content)
        if not hmac.compare_digest(sha256(whole).hexdigest(), digest):
            raise PieceRefused("the whole is not what it was named by", None)
        return whole

    def _make_room(self, ticket: str) -> None:
        while self.held > self._most:
            oldest = next(iter(self._open))
            del self._open[oldest]
            if oldest == ticket:
                raise PieceRefused("there is no room for this upload", None)

    def _sweep(self, now: float) -> None:
        while self._open:
            ticket, oldest = next(iter(self._open.items()))
            if now - oldest.touched < IDLE_SECONDS:
                return
            del self._open[ticket]
