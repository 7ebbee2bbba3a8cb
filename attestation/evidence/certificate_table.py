"""The certificate table that a host hands to its guest beside a report (extended report, configfs `auxblob`).

The host writes it and nothing authenticates it: it saves a download, and the verifier's pins decide what it is worth.
Layout: AMD publication 56421 (GHCB), "Certificate table": entries of 24 bytes {GUID, offset, length}, ended by an
all-zero entry; offsets count from the start of the table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from uuid import UUID

from attestation.errors import MalformedEvidence

VCEK_GUID = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
VLEK_GUID = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
ASK_GUID = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
"""ASK or ASVK."""
ARK_GUID = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
CRL_GUID = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")

MAX_TABLE_SIZE = 1 << 20
"""Bytes of a table that are read at all; the real ones take a few pages."""

MAX_ENTRIES = 32

_ENTRY = struct.Struct("<16sII")


def parse_certificate_table(raw: bytes) -> tuple[tuple[UUID, bytes], ...]:
    """The entries in their order, each with its bytes. An empty table, or none at all, has no entries.

    Bytes after the last entry's data are the host's page padding: they must be zero.

    Raises:
        MalformedEvidence: no end entry, an entry outside the table or inside the index, overlapping entries,
            the same GUID twice, an empty entry, bytes that belong to no entry and are not zero, or more than 1 MiB.
    """
    if not raw:
        return ()
    if len(raw) > MAX_TABLE_SIZE:
        raise _malformed(f"{len(raw)} bytes are more than the {MAX_TABLE_SIZE} that are read")
    index: list[tuple[UUID, int, int]] = []
    position = 0
    while True:
        if position + _ENTRY.size > len(raw):
            raise _malformed("the index has no end")
        guid, offset, length = _ENTRY.unpack_from(raw, position)
        position += _ENTRY.size
        if not any(guid) and not offset and not length:
            break
        if len(index) == MAX_ENTRIES:
            raise _malformed(f"more than {MAX_ENTRIES} entries")
        index.append((UUID(bytes=guid), offset, length))
    if len({guid for guid, _, _ in index}) != len(index):
        raise _malformed("the same GUID twice")
    end = position
    for guid, offset, length in sorted(index, key=lambda entry: entry[1]):
        if not length:
            raise _malformed(f"entry {guid} is empty")
        if offset < end:
            raise _malformed(f"entry {guid} overlaps what is before it")
        if offset + length > len(raw):
            raise _malformed(f"entry {guid} ends outside the table")
        if any(raw[end:offset]):
            raise _malformed(f"bytes before entry {guid} belong to no entry and are not zero")
        end = offset + length
    if any(raw[end:]):
        raise _malformed("bytes after the last entry are not zero")
    return tuple((guid, raw[offset : offset + length]) for guid, offset, length in index)


def encode_certificate_table(entries: Iterable[tuple[UUID, bytes]]) -> bytes:
    """A table of these entries, data packed in order after the index.

    Raises:
        MalformedEvidence: what `parse_certificate_table` would refuse.
    """
    items = list(entries)
    offset = (len(items) + 1) * _ENTRY.size
    index, data = bytearray(), bytearray()
    for guid, content in items:
        index += _ENTRY.pack(guid.bytes, offset + len(data), len(content))
        data += content
    table = bytes(index) + bytes(_ENTRY.size) + bytes(data)
    parse_certificate_table(table)
    return table


def _malformed(what: str) -> MalformedEvidence:
    return MalformedEvidence(what, where="certificate table", do="Take the table from the extended report unchanged.")
