"""Transfers in chunks: served from memory as they are pulled, assembled within bounds, checked before they are used.

Each chunk carries its offset and the XXH3-64 of its bytes, which finds damage early and at the speed of memory; that
nobody meant it, TLS between attested keys has seen to. The whole has to have the promised size before its receiver gets
to see it, and the promised SHA-256 where that stands in a signed document. A model's content address is computed once,
where it is made.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Final, Self

import xxhash

from fl.errors import MalformedMessage
from fl.tensors import Buffer
from fl.transport.drafts import draft_of, left_open, stored
from fl.transport.frames import CHUNK, Chunk, adapter_of, pack, unpack
from fl.transport.memory import OpenMemory, SealedMemory
from fl.transport.spool import Spool, Spooled
from fl.transport.stored import Stored

_CHUNK: Final = adapter_of(Chunk)


def serve_chunks(data: Buffer | Stored, offset: int = 0) -> Iterator[bytes]:
    """The frames of `data` from `offset` on, made as they are taken."""
    if isinstance(data, Stored):
        pieces = data.pieces(offset, CHUNK)
    else:
        view = memoryview(data)
        pieces = (view[start : start + CHUNK] for start in range(offset, len(view), CHUNK))
    for piece in pieces:
        yield pack(Chunk(offset=offset, xxh3=xxhash.xxh3_64_intdigest(piece)), piece)
        offset += len(piece)


def checked(frames: Iterable[bytes], *, start: int, size: int, where: str) -> Iterator[memoryview]:
    """The pieces of a transfer of `size` bytes from `start` on; frames after the last one are left unread.

    Raises MalformedMessage for a chunk out of place, too long or damaged.
    """
    at = start
    if at == size:
        return
    for raw in frames:
        head, piece = unpack(_CHUNK, raw, where=where)
        if head.offset != at or len(piece) != min(CHUNK, size - at):
            raise MalformedMessage(
                f"a chunk of {len(piece)} bytes for {head.offset} came at {at} of {size}", where=where
            )
        if xxhash.xxh3_64_intdigest(piece) != head.xxh3:
            raise MalformedMessage(f"the chunk at {at} is damaged", where=where)
        yield piece
        at += len(piece)
        if at == size:
            return


class Assembly:
    """A transfer that comes in, in one go or, after cuts, in several.

    `take` as often as it needs, then `seal`, or `leave_open` for what no other process gets.

    Room is taken for the whole size, which the caller has bounded: in memory, or where it is too large for it and there
    is a spool, in the spool. For one thread at a time.
    """

    def __init__(self, size: int, *, where: str, spool: Spool | None = None) -> None:
        """Raises MalformedMessage if it is empty, SpoolFailed."""
        if size < 1:
            raise MalformedMessage("the transfer is empty", where=where)
        self._draft = draft_of(size, spool)
        self._where = where
        self.size = size
        self.at = 0
        """How many bytes are there: the offset from which the rest is to come."""

    def take(self, frames: Iterable[bytes]) -> None:
        """Take the chunks that follow; frames after the last one are left unread.

        What has come before `frames` raise anything is kept. Raises MalformedMessage as `checked` does.
        """
        for piece in checked(frames, start=self.at, size=self.size, where=self._where):
            self._draft.write(self.at, piece)
            self.at += len(piece)

    def seal(self, *, sha256: str | None = None) -> SealedMemory | Spooled:
        """The whole, sealed. Raises MalformedMessage if something is missing, or if it has another digest."""
        self._demand_all()
        whole = stored(self._draft)
        if sha256 is not None and not hmac.compare_digest(whole.digest, sha256):
            whole.close()
            raise MalformedMessage(f"the transfer's SHA-256 is {whole.digest}, not {sha256}", where=self._where)
        return whole

    def leave_open(self) -> OpenMemory | Spooled:
        """The whole, for this process alone. Raises MalformedMessage if something is missing."""
        self._demand_all()
        return left_open(self._draft)

    def _demand_all(self) -> None:
        if self.at != self.size:
            raise MalformedMessage(f"the transfer ended after {self.at} of {self.size} bytes", where=self._where)

    def close(self) -> None:
        """Give the memory back, unless the whole was taken."""
        self._draft.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def assemble(
    frames: Iterable[bytes], *, size: int, sha256: str | None, where: str, spool: Spool | None = None
) -> SealedMemory | Spooled:
    """The transfer of exactly `size` bytes in `frames`, whole and sealed, with the digest `sha256` (None: not asked).

    Raises MalformedMessage as `Assembly` does.
    """
    with Assembly(size, where=where, spool=spool) as assembly:
        assembly.take(frames)
        return assembly.seal(sha256=sha256)
