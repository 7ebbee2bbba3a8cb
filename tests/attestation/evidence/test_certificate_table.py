"""The host's certificate table: entries survive the bytes, and a table that lies about itself is refused."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import MalformedEvidence
from attestation.evidence.certificate_table import (
    ARK_GUID,
    ASK_GUID,
    MAX_TABLE_SIZE,
    VCEK_GUID,
    encode_certificate_table,
    parse_certificate_table,
)

uuids = st.uuids().filter(lambda guid: guid.int != 0)
tables = st.lists(st.tuples(uuids, st.binary(min_size=1, max_size=64)), max_size=6, unique_by=lambda entry: entry[0])


@given(tables, st.integers(0, 64))
@settings(max_examples=100, deadline=None)
def test_entries_survive_the_bytes(entries: list[tuple[UUID, bytes]], padding: int) -> None:
    raw = encode_certificate_table(entries)
    assert parse_certificate_table(raw) == tuple(entries)
    assert parse_certificate_table(raw + bytes(padding)) == tuple(entries)


@given(st.binary(max_size=400))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        entries = parse_certificate_table(raw)
    except MalformedEvidence:
        return
    assert sum(len(content) for _, content in entries) <= len(raw)


def index(*entries: tuple[UUID, int, int]) -> bytes:
    rows = [struct.pack("<16sII", guid.bytes, offset, length) for guid, offset, length in entries]
    return b"".join(rows) + bytes(24)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x01" * 24, "no end"),
        (bytes(23), "no end"),
        (index((VCEK_GUID, 48, 9)) + b"x" * 8, "outside"),
        (index((VCEK_GUID, 2**32 - 1, 2**32 - 1)) + b"x", "outside"),
        (index((VCEK_GUID, 0, 8)) + b"x" * 8, "overlaps"),
        (index((VCEK_GUID, 72, 8), (ASK_GUID, 76, 8)) + b"x" * 12, "overlaps"),
        (index((VCEK_GUID, 72, 4), (VCEK_GUID, 76, 4)) + b"x" * 8, "twice"),
        (index((VCEK_GUID, 48, 0)), "empty"),
        (index((VCEK_GUID, 48, 4)) + b"xxxxyyyy", "after the last"),
        (index((VCEK_GUID, 52, 4)) + b"xxxxyyyy", "belong to no entry"),
        (bytes(MAX_TABLE_SIZE + 1), "more than"),
        (index(*((UUID(int=number), 0, 1) for number in range(1, 40))), "more than 32"),
    ],
)
def test_a_table_that_lies_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(MalformedEvidence, match=why):
        parse_certificate_table(raw)


def test_nothing_is_an_empty_table() -> None:
    assert parse_certificate_table(b"") == ()
    assert parse_certificate_table(bytes(4096)) == ()


def test_a_table_that_would_be_refused_is_not_made() -> None:
    with pytest.raises(MalformedEvidence, match="twice"):
        encode_certificate_table([(ARK_GUID, b"a"), (ARK_GUID, b"b")])
