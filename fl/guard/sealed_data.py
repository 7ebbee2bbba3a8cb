"""A site's data at rest: named entries in one encrypted file that is opened in memory only.

Layout of a sealed file, integers big-endian:

    magic "SEAL1" | chunk size as a power of two (u8, 12 to 24) | plaintext size (u64) | salt (32) | commitment (32)
    chunk 0 | chunk 1 | … | last chunk         each: ciphertext, then a 16-byte tag

The plaintext is `index size (u32) | index | the entries' bytes in the index's order`; the index is the canonical JSON
(RFC 8785) list of `{"name", "size"}`, names ascending. Every chunk but the last has exactly the chunk size, and an
empty plaintext cannot occur, so the sizes follow from the header and are checked against the file before more is read.

Chunks are AES-256-GCM under a key of this file alone: HKDF-SHA-256 over the data key with the salt. Their nonces are
the chunk's number (88 bits) and a byte that is 1 for the last chunk, as in STREAM (Hoang, Reyhanitabar, Rogaway and
Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015), with the whole header as
associated data: a flipped bit, a chunk left out, added, moved, or taken from another file, and a cut at any place are
all refused. The commitment, from the same HKDF, ties the file to one key (AES-GCM alone does not) and tells a wrong
key from a damaged file.
"""

from __future__ import annotations

import hmac
import itertools
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl.errors import SealedDataRefused

if TYPE_CHECKING:
    from fl.tensors import Buffer  # a guest without tensors opens sealed files too

MAGIC: Final = b"SEAL1"
HEADER: Final = struct.Struct(">5sBQ32s32s")
KEY_SIZE: Final = 32
SALT_SIZE: Final = 32
TAG_SIZE: Final = 16
CHUNK_BITS: Final = 20
CHUNK_BITS_RANGE: Final = range(12, 25)
SECTOR: Final = 512
"""Bytes that the size of a virtual disk is a multiple of."""
MAX_ENTRIES: Final = 10_000
MAX_INDEX: Final = 4 << 20
MAX_PLAINTEXT: Final = 64 << 30
"""No sealed file that holds more than this is opened, whatever it says of itself."""

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_INDEX_SIZE: Final = struct.Struct(">I")
_PURPOSE: Final = b"sealwright-sealed-data-v1"


class Long(Protocol):
    """An entry that is read piece by piece."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        """Its bytes from `offset` on, in pieces of `size`."""


def seal(
    entries: Mapping[str, Buffer | Long], key: bytes, *, salt: bytes, chunk_bits: int = CHUNK_BITS
) -> Iterator[bytes]:
    """The sealed file of `entries` (name → plaintext) under a 32-byte `key`, piece by piece.

    `salt` is 32 fresh random bytes, used once: two different contents under one key and one salt break the seal.
    Raises SealedDataRefused for entries that no reader would take.
    """
    index, total = _begin(sizes_of(entries))
    order = sorted(entries)
    if chunk_bits not in CHUNK_BITS_RANGE or len(salt) != SALT_SIZE:
        raise ValueError("a chunk size is 2**12 to 2**24 bytes, a salt 32 bytes")
    cipher_key, commitment = _derive(key, salt)
    header = HEADER.pack(MAGIC, chunk_bits, total, salt, commitment)
    cipher = AESGCM(cipher_key)
    yield header
    parts = (part for name in order for part in _parts(entries[name]))
    pieces = itertools.chain([_INDEX_SIZE.pack(len(index)) + index], parts)
    chunks = _chunk_count(total, 1 << chunk_bits)
    for number, chunk in enumerate(_regroup(pieces, 1 << chunk_bits)):
        yield cipher.encrypt(_nonce(number, last=number == chunks - 1), chunk, header)


def sizes_of(entries: Mapping[str, Buffer | Long]) -> dict[str, int]:
    """How many bytes each entry has."""
    return {name: _size(entry) for name, entry in entries.items()}


def sealed_size(sizes: Mapping[str, int]) -> int:
    """How many bytes `seal` makes of entries of these sizes, in chunks of the usual size.

    Raises SealedDataRefused as it does.
    """
    _, total = _begin(sizes)
    return HEADER.size + total + _chunk_count(total, 1 << CHUNK_BITS) * TAG_SIZE


class Stream(Protocol):
    """What a sealed file is read from."""

    def read(self, size: int, /) -> bytes:
        """The bytes that follow, `size` of them unless the end comes before."""


def unseal(
    stream: Stream, key: bytes, *, where: str, max_bytes: int = MAX_PLAINTEXT, file_size: int, sector: int = 1
) -> dict[str, bytes]:
    """The entries of the sealed file in `stream` (`file_size` bytes long), all of them or none.

    On a disk the file is followed by zeros up to the end of its last `sector`, and by nothing else.

    Raises SealedDataRefused: not a sealed file, another key, changed, cut, lengthened, or more than `max_bytes`.
    """
    total, chunks = opened(stream, key, where=where, max_bytes=max_bytes, file_size=file_size, sector=sector)
    plain = bytearray(total)
    at = 0
    for chunk in chunks:
        plain[at : at + len(chunk)] = chunk
        at += len(chunk)
    return {name: bytes(plain[start : start + size]) for name, start, size in read_index(plain, total, where=where)}


def opened(
    stream: Stream, key: bytes, *, where: str, max_bytes: int = MAX_PLAINTEXT, file_size: int, sector: int = 1
) -> tuple[int, Iterator[bytes]]:
    """The size of the plaintext, and its chunks as they are opened. It is whole when the iterator ends, not before.

    Both raise SealedDataRefused, as `unseal` does.
    """
    header = stream.read(HEADER.size)
    if len(header) != HEADER.size or not header.startswith(MAGIC):
        raise SealedDataRefused("this is not a sealed file", where=where)
    _, chunk_bits, total, salt, commitment = HEADER.unpack(header)
    if chunk_bits not in CHUNK_BITS_RANGE:
        raise SealedDataRefused("the sealed file's chunk size is out of bounds", where=where)
    if total > min(max_bytes, MAX_PLAINTEXT):
        raise SealedDataRefused(f"the sealed file holds more than {min(max_bytes, MAX_PLAINTEXT)} bytes", where=where)
    size = 1 << chunk_bits
    chunks = _chunk_count(total, size)
    whole = HEADER.size + total + chunks * TAG_SIZE
    if total < _INDEX_SIZE.size or file_size != whole + -whole % sector:
        raise SealedDataRefused("the sealed file is cut short, or something was added to it", where=where)
    cipher_key, expected = _derive(key, salt)
    if not hmac.compare_digest(expected, commitment):
        raise SealedDataRefused("the sealed file was sealed under another key, or its header was changed", where=where)
    cipher = AESGCM(cipher_key)

    def pieces() -> Iterator[bytes]:
        for number in range(chunks):
            wanted = min(size, total - number * size)
            sealed = stream.read(wanted + TAG_SIZE)
            try:
                piece = cipher.decrypt(_nonce(number, last=number == chunks - 1), sealed, header)
            except InvalidTag as error:
                what = f"chunk {number} of the sealed file was changed or moved"
                raise SealedDataRefused(what, where=where) from error
            if len(piece) != wanted:
                raise SealedDataRefused(f"chunk {number} of the sealed file is cut short", where=where)
            yield piece
        if stream.read(sector) != bytes(file_size - whole):
            raise SealedDataRefused("something was added to the sealed file", where=where)

    return total, pieces()


def seal_file(
    path: Path,
    entries: Mapping[str, Buffer | Long],
    key: bytes,
    *,
    random: Callable[[int], bytes] = os.urandom,
    chunk_bits: int = CHUNK_BITS,
) -> None:
    """Write `entries` sealed under `key` to `path` (mode 0600), replacing it whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with _draft(draft) as file:
        for piece in seal(entries, key, salt=random(SALT_SIZE), chunk_bits=chunk_bits):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        draft.replace(path)


def entries_of(total: int, chunks: Iterator[bytes], *, where: str) -> Iterator[tuple[str, int, Iterator[memoryview]]]:
    """The entries of what `opened` opens, one after the other: each one's name, its size, and its pieces, to be taken
    before the next entry. Nothing holds before the iterator has ended. Raises SealedDataRefused, also for an index that
    does not end in the first chunk.
    """
    first = next(chunks)
    index = read_index(first, total, where=where)
    rest = memoryview(first)[index[0][1] :]

    def pieces(size: int) -> Iterator[memoryview]:
        nonlocal rest
        while size:
            if not rest:
                rest = memoryview(next(chunks))
            piece, rest = rest[:size], rest[size:]
            size -= len(piece)
            yield piece

    for name, _, size in index:
        yield name, size, pieces(size)
    for _ in chunks:
        raise SealedDataRefused("the sealed file holds bytes that no entry names", where=where)


def open_file(path: Path, key: bytes, *, max_bytes: int = MAX_PLAINTEXT) -> dict[str, bytes]:
    """The entries (name → plaintext) of the sealed file at `path`; the plaintext is in memory only.

    In a virtual machine the file is a disk of its own (a block device). Raises SealedDataRefused as `unseal` does, and
    for a path that is neither a readable regular file nor a disk.
    """
    with stream_of(path) as (file, size, sector):
        return unseal(file, key, where=str(path), max_bytes=max_bytes, file_size=size, sector=sector)


@contextmanager
def stream_of(path: Path) -> Iterator[tuple[BinaryIO, int, int]]:
    """The sealed file at `path`, its size, and of what its size is a multiple. Raises SealedDataRefused as `open_file`
    does for a path."""
    where = str(path)
    try:
        # Not blocking: a pipe put in the file's place would keep its opener waiting for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISBLK(status.st_mode):
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                yield file, size, SECTOR
            elif stat.S_ISREG(status.st_mode):
                yield file, status.st_size, 1
            else:
                raise SealedDataRefused("this is neither a regular file nor a disk", where=where)
    except OSError as error:
        raise SealedDataRefused(f"the sealed file cannot be read: {error.strerror}", where=where) from error


@contextmanager
def _draft(path: Path) -> Iterator[BinaryIO]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _derive(key: bytes, salt: bytes) -> tuple[bytes, bytes]:
    """The cipher key of one file and its commitment."""
    if len(key) != KEY_SIZE:
        raise SealedDataRefused(f"a data key has {KEY_SIZE} bytes, this one {len(key)}", where="data key")
    both = HKDF(algorithm=SHA256(), length=2 * KEY_SIZE, salt=salt, info=_PURPOSE).derive(key)
    return both[:KEY_SIZE], both[KEY_SIZE:]


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\x01" if last else b"\x00")


def _chunk_count(total: int, size: int) -> int:
    return max(1, -(-total // size))


def _regroup(pieces: Iterable[Buffer], size: int) -> Iterator[bytes]:
    """The bytes of `pieces`, one after the other, in chunks of `size`; the last may be shorter, none is empty."""
    chunk = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        while view:
            taken = view[: size - len(chunk)]
            chunk += taken
            view = view[len(taken) :]
            if len(chunk) == size:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)


def _size(entry: Buffer | Long) -> int:
    return len(entry) if isinstance(entry, bytes | bytearray | memoryview) else entry.size


def _parts(entry: Buffer | Long) -> Iterator[Buffer]:
    if isinstance(entry, bytes | bytearray | memoryview):
        yield entry
    else:
        yield from entry.pieces(0, 1 << CHUNK_BITS)


def _begin(sizes: Mapping[str, int]) -> tuple[bytes, int]:
    """The index of entries of these sizes, and how many bytes the plaintext has with it."""
    index = _encode_index(sizes)
    total = _INDEX_SIZE.size + len(index) + sum(sizes.values())
    if total > MAX_PLAINTEXT:
        raise SealedDataRefused(f"{total} bytes are more than one file's {MAX_PLAINTEXT}", where="entries")
    return index, total


def _encode_index(sizes: Mapping[str, int]) -> bytes:
    if not 1 <= len(sizes) <= MAX_ENTRIES:
        raise SealedDataRefused(f"a sealed file has 1 to {MAX_ENTRIES} entries, not {len(sizes)}", where="entries")
    for name in sizes:
        if not NAME.fullmatch(name):
            raise SealedDataRefused(f"{name!r} is no name for an entry (letters, digits, . _ -)", where="entries")
    return rfc8785.dumps([{"name": name, "size": sizes[name]} for name in sorted(sizes)])


def read_index(plain: bytes | bytearray, total: int, *, where: str) -> list[tuple[str, int, int]]:
    """Each entry's name, place and size in an authentic plaintext of `total` bytes that begins with `plain`.

    It came from a holder of the key, which is no reason to trust its form. Raises SealedDataRefused, also if the index
    does not end in `plain`.
    """
    start = _INDEX_SIZE.size
    length = int.from_bytes(plain[:start], "big")
    if len(plain) < start or length > min(MAX_INDEX, len(plain) - start):
        raise SealedDataRefused("the sealed file's index is out of bounds", where=where)
    raw = bytes(plain[start : start + length])
    try:
        index = json.loads(raw)
        canonical = rfc8785.dumps(index)
    except (ValueError, RecursionError) as error:
        raise SealedDataRefused("the sealed file's index is malformed", where=where) from error
    if canonical != raw or not isinstance(index, list) or not 1 <= len(index) <= MAX_ENTRIES:
        raise SealedDataRefused("the sealed file's index is malformed", where=where)
    entries: list[tuple[str, int, int]] = []
    position, previous = start + length, ""
    for item in index:
        if not isinstance(item, dict) or item.keys() != {"name", "size"}:
            raise SealedDataRefused("the sealed file's index is malformed", where=where)
        name, size = item["name"], item["size"]
        if not isinstance(name, str) or not NAME.fullmatch(name) or name <= previous:
            raise SealedDataRefused("the sealed file's index has a bad, double or misplaced name", where=where)
        if type(size) is not int or not 0 <= size <= total - position:
            raise SealedDataRefused(f"the sealed file's entry {name} is out of bounds", where=where)
        entries.append((name, position, size))
        position, previous = position + size, name
    if position != total:
        raise SealedDataRefused("the sealed file holds bytes that no entry names", where=where)
    return entries
