"""Cosignatures and a witness's rules: C2SP's own example, one form each, and a state that only goes forward."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from attestation.errors import LedgerRefused
from attestation.ledger.checkpoint import MAX_CHECKPOINT, Checkpoint, parse_note, parse_signature, sign_checkpoint
from attestation.ledger.cosignature import Ledger, cosign, cosigned_at, cosigners, open_cosigned
from attestation.ledger.tree import EMPTY_ROOT, MemoryTree, consistency_proof
from attestation.ledger.witness import (
    AddCheckpoint,
    Denied,
    judge,
    parse_add_checkpoint,
    parse_cosignatures,
    parse_size,
)
from policies.errors import Refused, Unusable

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
ORIGIN = "virtual.trial/broker/one/ledger"
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
WITNESSES = {f"virtual.trial/witness/w{n}": Ed25519PrivateKey.generate() for n in range(3)}
PUBLIC = {name: key.public_key() for name, key in WITNESSES.items()}
LOGS = {ORIGIN: KEY.public_key()}


def tree(*leaves: str) -> MemoryTree:
    made = MemoryTree()
    for leaf in leaves:
        made.append(leaf.encode())
    return made


def checkpoint(of: MemoryTree, size: int | None = None) -> Checkpoint:
    return Checkpoint(ORIGIN, of.size if size is None else size, of.root(size))


def request(of: MemoryTree, old: int, *, key: Ed25519PrivateKey = KEY) -> AddCheckpoint:
    proof = tuple(consistency_proof(old, of.size, of.read)) if 0 < old <= of.size else ()
    return AddCheckpoint(old, proof, sign_checkpoint(checkpoint(of), key))


def cosigned(point: Checkpoint, *names: str, key: Ed25519PrivateKey = KEY) -> str:
    lines = (cosign(point, name, WITNESSES[name], AT).line() for name in names)
    return sign_checkpoint(point, key) + "".join(lines)


# --- cosignatures -----------------------------------------------------------------------------------------------------


def test_a_cosignature_signs_the_time_and_the_three_lines() -> None:
    name = "virtual.trial/witness/w0"
    point = checkpoint(tree("a", "b"))
    line = cosign(point, name, WITNESSES[name], AT).line()
    dash, by, blob = line.rstrip("\n").split(" ")
    raw, public = base64.b64decode(blob), PUBLIC[name]
    assert (dash, by, len(raw)) == ("\N{EM DASH}", name, 4 + 8 + 64)
    assert raw[:4] == sha256(name.encode() + b"\n\x04" + public.public_bytes_raw()).digest()[:4]
    seconds = int.from_bytes(raw[4:12], "big")
    assert seconds == int(AT.timestamp())
    public.verify(raw[12:], f"cosignature/v1\ntime {seconds}\n{point.text()}".encode())


def test_the_form_of_the_specifications_own_example() -> None:
    """C2SP tlog-cosignature's example: its keys are not published, its form and its time are."""
    note = (
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE"
        "+xeMcTOAYQ8=\n"
        "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0x"
        "Ue+mbIUBkBIfZ+qnA==\n"
    )
    found = parse_note(note)
    assert (found.checkpoint.size, [one.name for one in found.signatures]) == (
        20852163,
        ["example.com/behind-the-sofa", "witness.example.com/w1"],
    )
    assert int.from_bytes(found.signatures[1].signature[:8], "big") == 1679315147
    assert "".join(one.line() for one in found.signatures) == note.partition("\n\n")[2]


@pytest.mark.parametrize("needed", [0, 1, 2, 3])
def test_as_many_distinct_witnesses_as_are_needed(needed: int) -> None:
    point, names = checkpoint(tree("a", "b", "c")), list(WITNESSES)
    ledger = Ledger(ORIGIN, KEY.public_key(), PUBLIC, needed)
    for count in range(4):
        note = cosigned(point, *names[:count])
        if count >= needed:
            assert open_cosigned(note, ledger) == point
        else:
            with pytest.raises(LedgerRefused, match=names[2]):
                open_cosigned(note, ledger)
    again = cosigned(point, *[names[0]] * 3)
    assert list(cosigners(parse_note(again), PUBLIC)) == [names[0]]


def test_cosignatures_of_others_do_not_count() -> None:
    """A stranger's, one of another tree, the ledger's own under a witness's name, one with a changed time."""
    point, names = checkpoint(tree("a", "b")), list(WITNESSES)
    ledger = Ledger(ORIGIN, KEY.public_key(), PUBLIC, 1)
    stranger = sign_checkpoint(point, KEY) + cosign(point, "virtual.trial/witness/x", OTHER, AT).line()
    renamed = sign_checkpoint(point, KEY) + cosign(point, names[0], OTHER, AT).line()
    for note in (stranger, renamed):
        with pytest.raises(LedgerRefused, match="0 of the 1"):
            open_cosigned(note, ledger)
    elsewhere = cosign(checkpoint(tree("a", "c")), names[0], WITNESSES[names[0]], AT)
    good = cosign(point, names[0], WITNESSES[names[0]], AT)
    later = type(good)(good.name, good.key_id, (int(AT.timestamp()) + 1).to_bytes(8, "big") + good.signature[8:])
    for one in (elsewhere, later, type(good)(good.name, good.key_id, good.signature[:-1])):
        with pytest.raises(LedgerRefused, match="does not verify"):
            open_cosigned(sign_checkpoint(point, KEY) + one.line(), ledger)
    with pytest.raises(LedgerRefused, match="not signed by the key"):
        open_cosigned(cosigned(point, *names, key=OTHER), ledger)


def test_any_flipped_byte_of_a_cosigned_checkpoint_is_noticed() -> None:
    names = list(WITNESSES)[:2]
    ledger = Ledger(ORIGIN, KEY.public_key(), PUBLIC, 2)
    note = cosigned(checkpoint(tree("a", "b", "c")), *names).encode()
    for position in range(len(note)):
        changed = bytearray(note)
        changed[position] ^= 1
        with pytest.raises((Refused, Unusable)):
            open_cosigned(changed.decode("utf-8", errors="replace"), ledger)


# --- requests and answers ---------------------------------------------------------------------------------------------

SIZES = st.integers(0, 2**50 - 1)


@given(SIZES, st.lists(st.binary(min_size=32, max_size=32), max_size=63))
def test_a_request_is_read_as_it_was_written(old: int, proof: list[bytes]) -> None:
    made = AddCheckpoint(old, tuple(proof), sign_checkpoint(Checkpoint(ORIGIN, 7, bytes(32)), KEY))
    assert parse_add_checkpoint(made.to_bytes()) == made


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_arbitrary_bytes_are_no_request_and_no_answer(raw: bytes) -> None:
    readers: tuple[Callable[[bytes], object], ...] = (parse_add_checkpoint, parse_cosignatures)
    for read in readers:
        with pytest.raises(Unusable):
            read(raw)
    with pytest.raises(Unusable):
        parse_signature(raw.decode("utf-8", errors="replace"))


@given(st.data())
@settings(max_examples=200)
def test_a_request_with_something_changed_is_refused_or_says_something_else(data: st.DataObject) -> None:
    raw = bytearray(request(tree("a", "b", "c", "d", "e"), 3).to_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255).filter(lambda value: value != raw[position]))
    try:
        read = parse_add_checkpoint(bytes(raw))
    except Unusable:
        return
    assert read.to_bytes() == bytes(raw)
    assert isinstance(judge(read, LOGS, checkpoint(tree("a", "b", "c"))), Denied)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.replace(b"old 0", b"old 00"),
        lambda raw: raw.replace(b"old 0", b"old -1"),
        lambda raw: raw.replace(b"old 0", b"old  0"),
        lambda raw: raw.replace(b"old 0", b"old 0\r"),
        lambda raw: raw.replace(b"old 0", b"old 0\n" + b"\n".join([base64.b64encode(bytes(32))] * 64)),
        lambda raw: raw.replace(b"old 0", b"old 0\n" + base64.b64encode(bytes(31))),
        lambda raw: raw + b"\n",
        lambda raw: raw[:-1],
        lambda raw: raw + ("— " + "x" * 250 + " " + "A" * 200 + "\n").encode() * 20,
        lambda raw: raw + b"x" * MAX_CHECKPOINT,
    ],
)
def test_requests_of_another_form_are_refused(change: Callable[[bytes], bytes]) -> None:
    raw = request(tree("a"), 0).to_bytes()
    assert parse_add_checkpoint(raw).old == 0
    with pytest.raises(Unusable):
        parse_add_checkpoint(change(raw))


@pytest.mark.parametrize("raw", [b"", b"7", b"07\n", b"7\n\n", b"-7\n", b"7 \n", b"9" * 17 + b"\n", b"\xff\n"])
def test_a_size_has_one_form(raw: bytes) -> None:
    assert parse_size(b"0\n") == 0
    assert parse_size(b"123\n") == 123
    with pytest.raises(Unusable):
        parse_size(raw)


# --- the rules --------------------------------------------------------------------------------------------------------

ABC = tree("a", "b", "c")


@pytest.mark.parametrize(
    ("asked", "seen", "status", "size"),
    [
        (request(ABC, 0), None, None, None),
        (request(ABC, 2), checkpoint(ABC, 2), None, None),
        (request(ABC, 3), checkpoint(ABC), None, None),
        (request(ABC, 0, key=OTHER), None, 403, None),
        (AddCheckpoint(4, (), request(ABC, 0).note), checkpoint(ABC), 400, None),
        (request(ABC, 0), checkpoint(ABC, 2), 409, 2),
        (request(ABC, 2), None, 409, 0),
        (request(ABC, 3), checkpoint(tree("a", "b", "c", "d")), 409, 4),
        (request(ABC, 3), checkpoint(tree("a", "b", "x")), 409, 3),
        (request(ABC, 2), checkpoint(tree("a", "x")), 422, None),
        (AddCheckpoint(2, (), request(ABC, 2).note), checkpoint(ABC, 2), 422, None),
        (AddCheckpoint(0, (bytes(32),), request(ABC, 0).note), None, 422, None),
        (AddCheckpoint(0, (), sign_checkpoint(Checkpoint(ORIGIN, 0, bytes(32)), KEY)), None, 422, None),
        (AddCheckpoint(0, (), sign_checkpoint(Checkpoint(ORIGIN, 0, EMPTY_ROOT), KEY)), None, None, None),
    ],
)
def test_each_answer_of_the_specification(
    asked: AddCheckpoint, seen: Checkpoint | None, status: int | None, size: int | None
) -> None:
    found = judge(asked, LOGS, seen)
    if status is None:
        assert found == parse_note(asked.note).checkpoint
    else:
        assert isinstance(found, Denied)
        assert (found.status, found.size) == (status, size)


def test_an_unknown_ledger_is_not_looked_at() -> None:
    strange = AddCheckpoint(0, (), sign_checkpoint(Checkpoint("virtual.trial/broker/two/ledger", 3, bytes(32)), KEY))
    found = judge(strange, LOGS, None)
    assert isinstance(found, Denied)
    assert found.status == 404


class OneHistory(RuleBasedStateMachine):
    """Two copies of one ledger that go their own ways, and a broker that asks what it likes: one story is cosigned."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = [MemoryTree(), MemoryTree()]
        self.seen: Checkpoint | None = None
        self.story: list[Checkpoint] = []
        self.writer: dict[tuple[int, bytes], MemoryTree] = {}

    @rule(which=st.integers(0, 1), leaf=st.sampled_from("ab"))
    def append(self, which: int, leaf: str) -> None:
        self.copies[which].append(leaf.encode())

    @rule(which=st.integers(0, 1), old=st.integers(0, 12), true=st.booleans())
    def ask(self, which: int, old: int, true: bool) -> None:
        copy = self.copies[which]
        if true and self.seen is not None:
            old = self.seen.size
        found = judge(request(copy, old), LOGS, self.seen)
        if isinstance(found, Checkpoint):
            self.seen = found
            self.story.append(found)
            self.writer[found.size, found.root] = copy

    @invariant()
    def every_cosigned_tree_extends_all_before_it(self) -> None:
        if not self.story:
            return
        last = self.story[-1]
        teller = self.writer[last.size, last.root]
        for one in self.story:
            assert one.size <= last.size
            assert teller.root(one.size) == one.root


TestOneHistory = OneHistory.TestCase
TestOneHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_cosignature_of_another_key_is_nobodys() -> None:
    name = "virtual.trial/witness/w0"
    point = checkpoint(ABC)
    key: Ed25519PublicKey = OTHER.public_key()
    assert cosigned_at(point, cosign(point, name, WITNESSES[name], AT), name, key) is None
