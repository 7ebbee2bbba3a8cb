"""Reports and replies on the wire: what goes in comes out, and nothing else is more than refused."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.edge.exchange import Report
from fl.edge.partial_sum import PartialSum, VersionSum
from fl.edge.permits import Demand
from fl.edge.wire import decode_duplicates, decode_report, encode_duplicates, encode_report
from fl.errors import MalformedMessage
from fl.tensors import TensorSpec

SCHEMA = {"w": TensorSpec("F32", (2,))}
ORIGIN = "0" * 32
ORIGINS = st.integers(0, 5).map(lambda number: f"{number:032x}")
IDS = st.sets(st.integers(0, 255).map(lambda number: bytes([number]) * 32), min_size=1, max_size=6)


@given(st.dictionaries(ORIGINS, st.dictionaries(st.integers(0, 9), IDS, min_size=1), max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_report_survives_the_wire(claims: dict[str, dict[int, set[bytes]]], summed: bool) -> None:
    said = {origin: {v: sorted(ids) for v, ids in sorted(each.items())} for origin, each in sorted(claims.items())}
    total = VersionSum(SCHEMA)
    total.fold(bytes(32), {"w": np.ones(2, np.float32)}, 3.0)
    partial = PartialSum(ORIGIN, 4, {2: total}) if summed else None
    report = Report(ORIGIN, Demand(3, 4), said, partial)
    found = decode_report(encode_report(report), ORIGIN, Demand(3, 4), SCHEMA, where="test")
    assert (found.origin, found.demand, found.claims) == (ORIGIN, Demand(3, 4), said)
    assert (found.partial is None) == (partial is None)
    if found.partial is not None:
        assert (found.partial.sequence, found.partial.versions[2].weight) == (4, 3.0)


@given(st.dictionaries(ORIGINS, IDS, max_size=5))
def test_a_reply_survives_the_wire(duplicates: dict[str, set[bytes]]) -> None:
    found = decode_duplicates(encode_duplicates(duplicates), where="test")
    assert found == {origin: frozenset(ids) for origin, ids in duplicates.items()}


def headed(head: Any, rest: bytes = b"") -> bytes:
    text = json.dumps(head).encode()
    return struct.pack(">I", len(text)) + text + rest


GROUP = {"origin": ORIGIN, "version": 1, "count": 1}


@pytest.mark.parametrize(
    "raw",
    [
        b"\0",
        b"\xff\xff\xff\xff",
        headed({"claims": []}),
        headed({"claims": [], "partial": 0, "more": 1}),
        headed({"claims": [], "partial": 5}, b"1234"),
        headed({"claims": [], "partial": 0}, b"1"),
        headed({"claims": [GROUP], "partial": 0}, bytes(31)),
        headed({"claims": [GROUP | {"count": 0}], "partial": 0}),
        headed({"claims": [GROUP | {"count": 1 << 40}], "partial": 0}),
        headed({"claims": [GROUP | {"origin": "x"}], "partial": 0}, bytes(32)),
        headed({"claims": [GROUP, GROUP], "partial": 0}, bytes(64)),
        headed({"claims": [GROUP | {"count": 2}], "partial": 0}, bytes(64)),
        headed({"claims": [GROUP | {"version": -1}], "partial": 0}, bytes(32)),
        headed([]),
    ],
)
def test_a_malformed_report_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_report(raw, ORIGIN, Demand(), SCHEMA, where="test")


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_no_bytes_are_more_than_refused(noise: bytes, at: int, value: int) -> None:
    report = bytearray(encode_report(Report(ORIGIN, Demand(), {ORIGIN: {1: [bytes(32)]}})))
    reply = bytearray(encode_duplicates({ORIGIN: {bytes(32)}}))
    for raw in (report, reply):
        raw[at % len(raw)] = value
    for raw in (bytes(report), bytes(reply), noise, bytes(report) + noise):
        with contextlib.suppress(MalformedMessage):
            found = decode_report(raw, ORIGIN, Demand(), SCHEMA, where="test")
            assert sum(len(ids) for each in found.claims.values() for ids in each.values()) <= 1
        with contextlib.suppress(MalformedMessage):
            decode_duplicates(raw, where="test")
