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
from typing import Final

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


def assemble(frames: Iterable[bytes], *, size: int, sha256: str | None, where: str) -> SealedMemory:
    """The transfer of exactly `size` bytes in `frames`, whole and sealed, with the digest `sha256` (None: not asked).

    Memory is taken for `size`, which the caller has bounded; frames after the last chunk are left unread. Raises
    MalformedMessage for a chunk out of place, too long, damaged or missing, and for another digest.
    """
    if size < 1:
        raise MalformedMessage("the transfer is empty", where=where)
    hasher = None if sha256 is None else hashlib.sha256()
    at = 0
    with DraftMemory(size) as draft:
        for raw in frames:
            head, piece = unpack(_CHUNK, raw, where=where)
            if head.offset != at or len(piece) != min(CHUNK, size - at):
                raise MalformedMessage(
                    f"a chunk of {len(piece)} bytes for {head.offset} came at {at} of {size}", where=where
                )
            if xxhash.xxh3_64_intdigest(piece) != head.xxh3:
                raise MalformedMessage(f"the chunk at {at} is damaged", where=where)
            draft.view[at : at + len(piece)] = piece
            if hasher is not None:
                hasher.update(piece)
            at += len(piece)
            if at == size:
                break
        if at != size:
            raise MalformedMessage(f"the transfer ended after {at} of {size} bytes", where=where)
        if hasher is not None and sha256 is not None and not hmac.compare_digest(hasher.hexdigest(), sha256):
            raise MalformedMessage(f"the transfer's SHA-256 is {hasher.hexdigest()}, not {sha256}", where=where)
        return SealedMemory(*draft.seal())
