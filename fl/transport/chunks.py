"""Transfers in chunks: served from memory as they are pulled, assembled within bounds, checked before they are used.

Each chunk carries its offset and the XXH3-64 of its bytes, which finds damage early and at the speed of memory; that
nobody meant it, TLS between attested keys has seen to. The whole has to have the promised size before its receiver gets
to see it, and the promised SHA-256 where that stands in a signed document. A model's content address is computed once,
where it is made.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Final, Self

import xxhash

from fl.errors import MalformedMessage
from fl.tensors import Buffer
from fl.transport.frames import CHUNK, Chunk, adapter_of, pack, unpack
from fl.transport.memory import DraftMemory, SealedMemory

_CHUNK: Final = adapter_of(Chunk)


def serve_chunks(data: Buffer, offset: int = 0) -> Iterator[bytes]:
    """The frames of `data` from `offset` on, made as they are taken."""
    view = memoryview(data)
    for start in range(offset, len(view), CHUNK):
        piece = view[start : start + CHUNK]
        yield pack(Chunk(offset=start, xxh3=xxhash.xxh3_64_intdigest(piece)), piece)


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
    """A transfer that comes in, in one go or, after cuts, in several. `take` as often as it needs, then `seal`.

    Memory is taken for the whole size, which the caller has bounded. For one thread at a time.
    """

    def __init__(self, size: int, *, where: str) -> None:
        """Raises MalformedMessage if it is empty."""
        if size < 1:
            raise MalformedMessage("the transfer is empty", where=where)
        self._draft = DraftMemory(size)
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

    def seal(self, *, sha256: str | None = None) -> SealedMemory:
        """The whole, sealed. Raises MalformedMessage if something is missing, or if it has another digest."""
        if self.at != self.size:
            raise MalformedMessage(f"the transfer ended after {self.at} of {self.size} bytes", where=self._where)
        if sha256 is not None:
            found = hashlib.sha256(self._draft.view).hexdigest()
            if not hmac.compare_digest(found, sha256):
                raise MalformedMessage(f"the transfer's SHA-256 is {found}, not {sha256}", where=self._where)
        return SealedMemory(*self._draft.seal())

    def close(self) -> None:
        """Give the memory back, unless it was sealed."""
        self._draft.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def assemble(frames: Iterable[bytes], *, size: int, sha256: str | None, where: str) -> SealedMemory:
    """The transfer of exactly `size` bytes in `frames`, whole and sealed, with the digest `sha256` (None: not asked).

    Raises MalformedMessage as `Assembly` does.
    """
    with Assembly(size, where=where) as assembly:
        assembly.take(frames)
        return assembly.seal(sha256=sha256)
