"""Models in memory files: written once, sealed, then passed between processes by descriptor and mapped, never copied.

A receiver takes a descriptor from a process that it does not trust only if the kernel says that nobody can change,
shrink or grow the file any more (fcntl(2), F_ADD_SEALS): a write after the check cannot exist.

What is written from one end to the other is written with pwrite(2), not through a mapping: the kernel then neither
zeroes a fresh page nor takes a fault for it, which is half of what writing a new file costs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from fl.errors import MalformedMessage
from fl.tensors import Buffer, TensorSpec, pieces
from fl.transport.stored import Stored

_HASHED_AT_ONCE: Final = 1 << 20
"""Bytes below which a thread for hashing costs more than it saves."""
_AHEAD: Final = 8
"""Pieces of a model that wait to be hashed."""
SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class InMemory(Stored):
    """What lies in this machine's memory as a whole, whatever kind of memory it is."""

    _digest: str | None = None

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = hashlib.sha256(self.view).hexdigest()
        return self._digest

    @digest.setter
    def digest(self, digest: str) -> None:
        """Who has hashed the bytes on the way need not have it done again."""
        self._digest = digest

    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        view = self.view
        for start in range(offset, self.size, size):
            yield view[start : start + size]

    @property
    def source(self) -> memoryview:
        return self.view


class MemoryFile(InMemory):
    """A memory file of one descriptor, mapped as a whole."""

    def __init__(self, descriptor: int, size: int, mapping: mmap.mmap, digest: str | None) -> None:
        self.descriptor = descriptor
        self.size = size
        self._mapping: mmap.mmap | None = mapping
        self._digest = digest
        self.on_close: Callable[[], None] | None = None
        """Called once, when the descriptor is given back."""

    @property
    def view(self) -> memoryview:
        """The bytes. Raises ValueError when it is closed."""
        return memoryview(self._open_mapping())

    def _open_mapping(self) -> mmap.mmap:
        if self._mapping is None:
            raise ValueError("this memory is closed")
        return self._mapping

    def close(self) -> None:
        """Give the descriptor back. The mapping goes when the last array over it goes."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        os.close(self.descriptor)
        self.descriptor = -1
        with contextlib.suppress(BufferError):  # arrays over it are still in use: they keep the pages until they go
            mapping.close()
        if self.on_close is not None:
            self.on_close()

    def __del__(self) -> None:
        """What nobody has closed (a result that is kept no more) goes with its last user."""
        if getattr(self, "_mapping", None) is not None:
            self.close()


class OpenMemory(MemoryFile):
    """A memory file of this process alone, whose bytes may be changed in place until it is handed on.

    What comes in, is worked on and goes out again needs no other pages, which the kernel would have to find and clear.
    """

    def __init__(
        self, descriptor: int, size: int, digest: str | None = None, *, mapping: mmap.mmap | None = None
    ) -> None:
        """`digest`: the content address, and `mapping`: of the whole file, where they are there already."""
        super().__init__(descriptor, size, mmap.mmap(descriptor, size) if mapping is None else mapping, digest)

    def hand_over(self) -> OpenMemory:
        """The same in another hand: this one is closed, and what was promised for its end is done."""
        heir = OpenMemory(self.descriptor, self.size, self._digest, mapping=self._open_mapping())
        self.descriptor, self._mapping = -1, None
        if self.on_close is not None:
            self.on_close()
        return heir

    def share(self) -> OpenMemory:
        return OpenMemory(os.dup(self.descriptor), self.size, self._digest)

    def in_memory(self) -> SealedMemory:
        return SealedMemory.of(self.view)


class SealedMemory(MemoryFile):
    """A memory file that nobody can change, mapped privately: `view` may be written to, the file stays as it is."""

    def __init__(self, descriptor: int, size: int, digest: str | None = None) -> None:
        """`digest`: the content address, where it is known already."""
        private = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        super().__init__(descriptor, size, private, digest)

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
            draft.write(0, data)
            return cls(*draft.seal())

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, tuple[TensorSpec, Buffer]]) -> Self:
        """One safetensors file of `tensors`, byte for byte what `fl.tensors.encode` makes of them."""
        size, parts = pieces(tensors)
        with DraftMemory(size) as draft:
            for at, part in parts:
                draft.write(at, part)
            return cls(*draft.seal())

    @classmethod
    def of_pieces(cls, size: int, parts: Iterable[Buffer]) -> Self:
        """A sealed memory file of `size` bytes, which `parts` are, one after the other."""
        with DraftMemory(size) as draft:
            at = 0
            for part in parts:
                draft.write(at, part)
                at += memoryview(part).nbytes
            return cls(*draft.seal())

    def share(self) -> SealedMemory:
        return SealedMemory(os.dup(self.descriptor), self.size, self._digest)

    def in_memory(self) -> SealedMemory:
        return self.share()


class OwnMemory(InMemory):
    """Memory of this process alone: for what is made here and sent, and never handed to another process.

    A memory file costs a call for each piece and the kernel a page at a time; this is one array, in large pages.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._bytes: npt.NDArray[np.uint8] | None = np.empty(size, dtype=np.uint8)

    @property
    def view(self) -> memoryview:
        """The bytes, to be written until the memory is handed on. Raises ValueError when it is closed."""
        if self._bytes is None:
            raise ValueError("this memory is closed")
        return self._bytes.data

    def share(self) -> OwnMemory:
        same = OwnMemory(0)
        same.size, same._bytes, same._digest = self.size, self._bytes, self._digest
        return same

    def in_memory(self) -> SealedMemory:
        return SealedMemory.of(self.view)

    def close(self) -> None:
        self._bytes = None


class DraftMemory:
    """A memory file of `size` bytes while it is being written. `seal` ends that; without it the draft is discarded."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._descriptor = os.memfd_create("sealwright", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, size)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def view(self) -> memoryview:
        """The bytes, to be written here and there or read again; for long stretches `write` is faster."""
        if self._view is None:
            self._mapping = mmap.mmap(self._descriptor, self.size)
            self._view = memoryview(self._mapping)
        return self._view

    def write(self, at: int, data: Buffer) -> None:
        """Write `data` from byte `at` on. Raises ValueError if it does not fit."""
        rest = memoryview(data).cast("B")
        if not 0 <= at <= self.size - len(rest):
            raise ValueError(f"{len(rest)} bytes at {at} do not fit into {self.size}")
        while rest:
            written = os.pwrite(self._descriptor, rest, at)
            at, rest = at + written, rest[written:]

    def leave_open(self) -> tuple[int, int]:
        """End the writing here; the descriptor, which is the caller's from now on, and the size."""
        self._unmap()
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor, self.size

    def seal(self) -> tuple[int, int]:
        """The same, of a file that nobody can change any more."""
        descriptor, _ = self.leave_open()
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, self.size

    def _unmap(self) -> None:
        if self._view is not None:
            self._view.release()
            self._view = None
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


class ContentAddress:
    """The SHA-256 of a file of `size` bytes that is being written.

    Hashing is the slowest thing that is done to a model: a large one is hashed on a thread of its own.
    """

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._pieces: queue.Queue[Buffer | None] = queue.Queue(_AHEAD)
        self._hasher: threading.Thread | None = None
        if size > _HASHED_AT_ONCE:
            self._hasher = threading.Thread(target=self._hash, name="content address", daemon=True)
            self._hasher.start()

    def add(self, piece: Buffer) -> None:
        """The bytes that follow, which may not change any more."""
        if self._hasher is None:
            self._sha256.update(piece)
        else:
            self._pieces.put(piece)

    def end(self) -> str:
        """The address of all that was added, in lower-case hex."""
        if self._hasher is not None:
            self._pieces.put(None)
            self._hasher.join()
            self._hasher = None
        return self._sha256.hexdigest()

    def _hash(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._sha256.update(piece)


class NamedDraft:
    """A memory file that is written from its first byte to its last and gets its content address on the way."""

    def __init__(self, size: int) -> None:
        self._draft = DraftMemory(size)
        self._at = 0
        self._address = ContentAddress(size)

    def append(self, piece: Buffer) -> None:
        """Write the bytes that follow. They may not change any more. Raises ValueError if they do not fit."""
        self._draft.write(self._at, piece)
        self._at += memoryview(piece).nbytes
        self._address.add(piece)

    def seal(self) -> SealedMemory:
        """The whole, sealed and named. Raises ValueError if something is missing."""
        if self._at != self._draft.size:
            raise ValueError(f"{self._at} of {self._draft.size} bytes were written")
        return SealedMemory(*self._draft.seal(), self._address.end())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._address.end()
        self._draft.discard()
