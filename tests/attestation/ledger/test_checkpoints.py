"""Checkpoints, entries and receipts: one byte form each, one signer, nothing to change."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import LedgerRefused
from attestation.ledger.checkpoint import Checkpoint, ledger_origin, open_checkpoint, parse_checkpoint, sign_checkpoint
from attestation.ledger.cosignature import Ledger
from attestation.ledger.entry import MAX_ENTRY, Entry, parse_entry
from attestation.ledger.receipt import Receipt, check_receipt, parse_receipt
from attestation.ledger.tree import MemoryTree, inclusion_proof
from policies.errors import Refused, Unusable

KEY = Ed25519PrivateKey.generate()
ORIGIN = ledger_origin("virtual.trial", "one")
LEDGER = Ledger(ORIGIN, KEY.public_key(), {}, 0)
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_a_checkpoint_is_a_c2sp_signed_note() -> None:
    note = sign_checkpoint(Checkpoint(ORIGIN, 7, bytes(range(32))), KEY)
    text, _, signatures = note.partition("\n\n")
    assert text.split("\n") == [ORIGIN, "7", base64.b64encode(bytes(range(32))).decode()]
    dash, name, blob = signatures.rstrip("\n").split(" ")
    raw, public = base64.b64decode(blob), KEY.public_key().public_bytes_raw()
    assert (dash, name) == ("\N{EM DASH}", ORIGIN)
    assert raw[:4] == sha256(ORIGIN.encode() + b"\n\x01" + public).digest()[:4]
    KEY.public_key().verify(raw[4:], (text + "\n").encode())
    assert open_checkpoint(note, ORIGIN, KEY.public_key()) == Checkpoint(ORIGIN, 7, bytes(range(32)))


def test_any_flipped_byte_of_a_checkpoint_is_noticed() -> None:
    note = sign_checkpoint(Checkpoint(ORIGIN, 12, bytes(32)), KEY).encode()
    for position in range(len(note)):
        for bit in (1, 32, 128):
            changed = bytearray(note)
            changed[position] ^= bit
            with pytest.raises((Refused, Unusable)):
                open_checkpoint(changed.decode("utf-8", errors="replace"), ORIGIN, KEY.public_key())


def test_another_key_or_ledger_is_refused() -> None:
    note = sign_checkpoint(Checkpoint(ORIGIN, 1, bytes(32)), KEY)
    with pytest.raises(LedgerRefused):
        open_checkpoint(note, ORIGIN, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(LedgerRefused):
        open_checkpoint(note, ledger_origin("virtual.trial", "two"), KEY.public_key())
    for bad in (note + "\n", note.replace("\n1\n", "\n01\n"), note.replace("\n1\n", "\n+1\n"), note[:-1], "", "\n" * 5):
        with pytest.raises(Unusable):
            parse_checkpoint(bad)


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_arbitrary_bytes_are_no_entry(raw: bytes) -> None:
    with pytest.raises(Unusable):
        parse_entry(raw)


def test_an_entry_has_one_form() -> None:
    raw = Entry("release", AT, {"resource": "a/b/c", "n": 1}).to_bytes()
    assert raw == b'{"body":{"n":1,"resource":"a/b/c"},"kind":"release","time":"2026-01-31T12:00:00Z"}'
    assert parse_entry(raw) == Entry("release", AT, {"n": 1, "resource": "a/b/c"})
    for other in (raw + b"\n", raw.replace(b"12:00:00Z", b"12:00:61Z"), raw.replace(b"release", b"Release"), b"{}"):
        with pytest.raises(Unusable):
            parse_entry(other)
    with pytest.raises(Unusable):
        Entry("release", AT, {"x": "y" * MAX_ENTRY}).to_bytes()
    with pytest.raises(Unusable):
        Entry("release", AT, {"x": 2**60}).to_bytes()


def test_a_receipt_shows_one_entry_only() -> None:
    tree = MemoryTree()
    entries = [Entry("job", AT, {"n": n}).to_bytes() for n in range(5)]
    for entry in entries:
        tree.append(entry)
    note = sign_checkpoint(Checkpoint(ORIGIN, 5, tree.root()), KEY)
    receipt = Receipt(3, note, tuple(inclusion_proof(3, 5, tree.read)))
    assert parse_receipt(receipt.to_json()) == receipt
    assert check_receipt(receipt, entries[3], LEDGER).size == 5
    for entry in entries[:3]:
        with pytest.raises(LedgerRefused):
            check_receipt(receipt, entry, LEDGER)
    with pytest.raises(LedgerRefused):
        check_receipt(Receipt(2, note, receipt.proof), entries[3], LEDGER)
    for changed in (
        {"index": True},
        {"proof": ["x"]},
        {"proof": [1]},
        {"more": 1},
        {"checkpoint": "x" * 9000},
        {"index": None},
    ):
        with pytest.raises(Unusable):
            parse_receipt({**receipt.to_json(), **changed})
