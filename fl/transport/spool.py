"""A place for what is too large for memory: files on a disk that its host may read and change, and learns nothing from.

Every piece of a file is AES-256-GCM under one key that is made when the spool is and that is never written anywhere:
what was spooled before a restart can never be read again. A nonce is a number that the spool uses once. Which nonce a
piece has is known in memory alone, so a piece that was changed, moved, taken from another file, or put back as it was
earlier does not open. Files have no name: they go with their process, whatever ends it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fl.errors import SpoolFailed
from fl.tensors import Buffer, Source
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored

PIECE: Final = 1 << 20
"""Bytes of plaintext that are encrypted together."""
TAG: Final = 16
MEMORY_PART: Final = 8
"""What is larger than this part of the machine's memory is spooled."""


def memory_part() -> int:
    """A MEMORY_PART of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY_PART


class Spool:
    """Encrypted files in one folder. Safe to use from many threads; each draft by one at a time."""

    def __init__(
        self, folder: Path, *, in_memory: int | None = None, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        """Whatever has more than `in_memory` bytes is spooled (None: a MEMORY_PART of the machine's memory)."""
        self._folder = folder
        self._cipher = AESGCM(random(32))
        self._nonces = itertools.count(1)
        self._lock = threading.Lock()
        self._in_memory = memory_part() if in_memory is None else in_memory

    def takes(self, size: int) -> bool:
        """Whether what has `size` bytes is to be spooled."""
        return size > self._in_memory

    @property
    def free(self) -> int:
        """Bytes that the folder's disk has left."""
        try:
            found = os.statvfs(self._folder)
        except OSError as error:
            raise SpoolFailed(
                f"the spool's folder cannot be used: {error.strerror}", where=str(self._folder)
            ) from error
        return found.f_bavail * found.f_frsize

    def file(self, piece: int = PIECE) -> SpoolFile:
        """A new, empty file of pieces of at most `piece` bytes. Raises SpoolFailed."""
        return SpoolFile(self._folder, self._cipher, self._nonce, piece)

    def _nonce(self) -> bytes:
        with self._lock:
            return next(self._nonces).to_bytes(12, "big")


class SpoolFile:
    """Numbered pieces, each written and read whole, as often as wanted."""

    def __init__(self, folder: Path, cipher: AESGCM, nonce: Callable[[], bytes], piece: int) -> None:
        self._cipher = cipher
        self._nonce = nonce
        self._room = piece + TAG
        self._written: dict[int, tuple[bytes, int]] = {}  # each piece's nonce and size as it was written last
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise SpoolFailed(f"the spool's folder cannot be used: {error.strerror}", where=str(folder)) from error

    def write(self, number: int, data: Buffer) -> None:
        """Write a piece. Raises SpoolFailed when the disk is full."""
        nonce = self._nonce()
        rest = memoryview(self._cipher.encrypt(nonce, data, None))
        if len(rest) > self._room:
            raise ValueError(f"a piece of {len(rest) - TAG} bytes is longer than {self._room - TAG}")
        at, size = number * self._room, len(rest)
        try:
            while rest:
                count = os.pwrite(self._file.fileno(), rest, at)
                at, rest = at + count, rest[count:]
        except OSError as error:
            raise SpoolFailed(f"the spool cannot be written: {error.strerror}", where="spool") from error
        self._written[number] = nonce, size

    def read(self, number: int) -> bytes:
        """A piece as it was written last. Raises SpoolFailed if the disk gives anything else."""
        nonce, size = self._written[number]
        try:
            raw = os.pread(self._file.fileno(), size, number * self._room)
            return self._cipher.decrypt(nonce, raw, None)
        except (OSError, InvalidTag) as error:
            raise SpoolFailed("what lies in the spool was changed on its disk", where="spool") from error

    def close(self) -> None:
        """Give the disk's space back."""
        self._file.close()

    def __del__(self) -> None:
        """What nobody has closed goes with its last user."""
        if getattr(self, "_file", None) is not None:
            self._file.close()


class SpoolDraft:
    """`size` bytes that are written from the first to the last. Without `seal` they are discarded."""

    def __init__(self, spool: Spool, size: int) -> None:
        self.size = size
        self._file = spool.file()
        self._at = 0
        self._number = 0
        self._held = bytearray()
        self._sealed = False

    def write(self, at: int, data: Buffer) -> None:
        """Write the bytes that follow, which `at` has to say. Raises ValueError, SpoolFailed."""
        rest = memoryview(data).cast("B")
        if at != self._at or len(rest) > self.size - at:
            raise ValueError(f"{len(rest)} bytes at {at} do not follow {self._at} of {self.size}")
        self._at += len(rest)
        while rest:
            taken = rest[: PIECE - len(self._held)]
            rest = rest[len(taken) :]
            if len(taken) == PIECE:
                self._write(taken)
                continue
            self._held += taken
            if len(self._held) == PIECE:
                self._write(self._held)
                self._held.clear()

    def _write(self, piece: Buffer) -> None:
        self._file.write(self._number, piece)
        self._number += 1

    def seal(self, digest: str | None = None) -> Spooled:
        """The whole. Raises ValueError if something is missing, SpoolFailed."""
        if self._at != self.size:
            raise ValueError(f"{self._at} of {self.size} bytes were written")
        if self._held:
            self._write(self._held)
        self._sealed = True
        return Spooled(_Users(self._file), self.size, digest)

    def discard(self) -> None:
        """Give it back, unless it was sealed."""
        if not self._sealed:
            self._file.close()


class _Users:
    """A file that is closed when the last who uses it does not any more."""

    def __init__(self, file: SpoolFile) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._count = 1

    def more(self) -> None:
        with self._lock:
            self._count += 1

    def fewer(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self.file.close()


class Spooled(Stored):
    """Bytes in the spool."""

    def __init__(self, users: _Users, size: int, digest: str | None = None) -> None:
        self.size = size
        self._users: _Users | None = users
        self._file = users.file
        self._digest = digest
        self._last: tuple[int, bytes] = (-1, b"")
        self.on_close: Callable[[], None] | None = None
        """Called once, when it is given back."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop`. Raises SpoolFailed if the disk gives anything else than what was written."""
        first, last = start // PIECE, max(start, stop - 1) // PIECE
        if first == last:
            return memoryview(self._piece(first))[start - first * PIECE : stop - first * PIECE]
        found = bytearray(stop - start)
        at = 0
        for number in range(first, last + 1):
            piece = memoryview(self._piece(number))
            part = piece[max(0, start - number * PIECE) : stop - number * PIECE]
            found[at : at + len(part)] = part
            at += len(part)
        return memoryview(found)

    def _piece(self, number: int) -> bytes:
        kept, piece = self._last
        if kept != number:
            piece = self._file.read(number)
            self._last = number, piece
        return piece

    @property
    def digest(self) -> str:
        if self._digest is None:
            found = hashlib.sha256()
            for piece in self.pieces(0, PIECE):
                found.update(piece)
            self._digest = found.hexdigest()
        return self._digest

    @property
    def view(self) -> memoryview:
        return self.read(0, self.size)

    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        for start in range(offset, self.size, size):
            yield self.read(start, min(start + size, self.size))

    @property
    def source(self) -> Source:
        return self

    def share(self) -> Spooled:
        if self._users is None:
            raise ValueError("it was closed")
        self._users.more()
        return Spooled(self._users, self.size, self._digest)

    def in_memory(self) -> SealedMemory:
        return SealedMemory.of_pieces(self.size, self.pieces(0, PIECE))

    def close(self) -> None:
        users, self._users = self._users, None
        if users is not None:
            users.fewer()
            if self.on_close is not None:
                self.on_close()

    def __del__(self) -> None:
        """What nobody has closed goes with its last user, and so does the room that it took."""
        if getattr(self, "_users", None) is not None:
            self.close()
