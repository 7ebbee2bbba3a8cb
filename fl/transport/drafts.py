"""Files that are being made: in memory, or, where they are too large for it and there is a spool, in the spool."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self, TypeAlias

from fl.tensors import Buffer
from fl.transport.memory import ContentAddress, DraftMemory, OpenMemory, SealedMemory
from fl.transport.spool import Spool, SpoolDraft, Spooled

Draft: TypeAlias = DraftMemory | SpoolDraft


def draft_of(size: int, spool: Spool | None) -> Draft:
    """A draft of `size` bytes, in its place. Raises SpoolFailed."""
    return SpoolDraft(spool, size) if spool is not None and spool.takes(size) else DraftMemory(size)


def stored(draft: Draft, digest: str | None = None) -> SealedMemory | Spooled:
    """A draft that is whole, sealed; `digest` is its content address, where it is known."""
    return draft.seal(digest) if isinstance(draft, SpoolDraft) else SealedMemory(*draft.seal(), digest)


def left_open(draft: Draft) -> OpenMemory | Spooled:
    """A draft that is whole; in memory it may be changed in place."""
    return draft.seal() if isinstance(draft, SpoolDraft) else OpenMemory(*draft.leave_open())


def written(size: int, pieces: Iterable[Buffer], spool: Spool | None) -> SealedMemory | Spooled:
    """A file of `size` bytes, which `pieces` are, named. Raises SpoolFailed."""
    with ModelDraft(size, spool) as draft:
        for piece in pieces:
            draft.append(piece)
        return draft.seal()


class ModelDraft:
    """As `fl.transport.memory.NamedDraft`, in the spool where it is too large for memory."""

    def __init__(self, size: int, spool: Spool | None) -> None:
        """Raises SpoolFailed."""
        self._draft = draft_of(size, spool)
        self._at = 0
        self._address = ContentAddress(size)

    def append(self, piece: Buffer) -> None:
        """Write the bytes that follow. They may not change any more. Raises ValueError, SpoolFailed."""
        self._draft.write(self._at, piece)
        self._at += memoryview(piece).nbytes
        self._address.add(piece)

    def seal(self) -> SealedMemory | Spooled:
        """The whole, sealed and named. Raises ValueError if something is missing, SpoolFailed."""
        if self._at != self._draft.size:
            raise ValueError(f"{self._at} of {self._draft.size} bytes were written")
        return stored(self._draft, self._address.end())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._address.end()
        self._draft.discard()
