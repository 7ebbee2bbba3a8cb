"""Models in memory files: written once, sealed, then passed between processes by descriptor and mapped, never copied.

A receiver takes a descriptor from a process that it does not trust only if the kernel says that nobody can change,
shrink or grow the file any more (fcntl(2), F_ADD_SEALS): a write after the check cannot exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from fl.errors import MalformedMessage

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SealedMemory:
    """A memory file that nobody can change, mapped privately: `view` may be written to, the file stays as it is."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self._mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._digest: str | None = None
        self.on_close: Callable[[], None] | None = None
        """Called once, when the descriptor is given back."""

    @classmethod
    def adopt(cls, descriptor: int, *, max_size: int, where: str) -> Self:
        """Take over a descriptor from another process; it is closed if it is refused.

        Raises MalformedMessage unless it is a sealed memory file of 1 to `max_size` bytes.
        """
        try:
            try:
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            except OSError as error:
                raise MalformedMessage("the descriptor is not a memory file", where=where) from error
            if seals & SEALS != SEALS:
                raise MalformedMessage("the memory file is not sealed", where=where)
            size = os.fstat(descriptor).st_size
            if not 0 < size <= max_size:
                raise MalformedMessage(f"the memory file has {size} bytes; 1 to {max_size} are allowed", where=where)
            return cls(descriptor, size)
        except MalformedMessage:
            os.close(descriptor)
            raise

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview) -> Self:
        """A sealed memory file with a copy of `data`."""
        with DraftMemory(len(data)) as draft:
            draft.view[:] = data
            return cls(*draft.seal())

    @property
    def view(self) -> memoryview:
        """The bytes; changes to them stay in this process."""
        return memoryview(self._mapping)

    @property
    def digest(self) -> str:
        """The content address: lower-case hex SHA-256, computed once."""
        if self._digest is None:
            self._digest = hashlib.sha256(self._mapping).hexdigest()
        return self._digest

    def share(self) -> SealedMemory:
        """The same memory once more, with a life of its own; nothing is copied."""
        return SealedMemory(os.dup(self.descriptor), self.size)

    def close(self) -> None:
        """Give the descriptor back. The mapping goes when the last array over it goes."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            if self.on_close is not None:
                self.on_close()
        try:
            self._mapping.close()
        except BufferError:
            return  # arrays over it are still in use: they keep the pages until they are dropped

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DraftMemory:
    """A memory file of `size` bytes while it is being written. `seal` ends that; without it the draft is discarded."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._descriptor = os.memfd_create("sealwright", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, size)
            self._mapping: mmap.mmap | None = mmap.mmap(self._descriptor, size)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.view = memoryview(self._mapping)

    def seal(self) -> tuple[int, int]:
        """End the writing; the descriptor, which is the caller's from now on, and the size."""
        self._unmap()
        descriptor, self._descriptor = self._descriptor, -1
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, self.size

    def _unmap(self) -> None:
        self.view.release()
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Give it back, unless it was sealed."""
        if self._descriptor >= 0:
            self._unmap()
            os.close(self._descriptor)
            self._descriptor = -1
