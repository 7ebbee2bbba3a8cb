"""What brokers agree on, and the form of several EARs: as functions, for anything that may come."""

from __future__ import annotations

import os
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from attestation.agreement import SPREAD, Said, agree
from attestation.canonical import unb64url
from attestation.ear import TYPE
from attestation.ears import MAX_EAR, MAX_EARS, MAX_EARS_SIZE, MAX_PACKED, pack_ears, unpack_ears
from attestation.errors import BrokersDisagree, BrokerUnavailable
from attestation.fan_out import ask_all
from attestation.jws import sign_jws
from policies.errors import Unusable

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def said(broker: str, seconds: float = 0.0, version: int = 3, *, asked: float = 100.0, heard: float = 100.2) -> Said:
    return Said(broker, NOON + timedelta(seconds=seconds), version, asked, heard)


def test_three_that_agree_give_a_time_that_none_has_passed() -> None:
    found = agree([said("a"), said("b", 1), said("c", 2)], 2, 3, 100.3)
    assert (found.brokers, found.version) == (("a", "b", "c"), 3)
    assert NOON + timedelta(seconds=2) <= found.time <= NOON + timedelta(seconds=2.4)


def test_a_slow_answer_is_no_disagreement_and_moves_no_clock() -> None:
    """A broker that signed at noon, whose answer the host held back for eight seconds."""
    late = said("b", 0, asked=100, heard=108)
    found = agree([said("a"), late], 2, 3, 108)
    assert found.time >= NOON + timedelta(seconds=7.8)
    alone = agree([late], 1, 3, 108)
    assert alone.time >= NOON + timedelta(seconds=8), "a lease rather ends early than late"


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_too_few_are_not_believed(needed: int) -> None:
    with pytest.raises(BrokersDisagree):
        agree([said(name) for name in "abc"[: needed - 1]], needed, 3, 101)


def test_two_groups_of_one_size_cancel_each_other() -> None:
    with pytest.raises(BrokersDisagree, match="10 s apart"):
        agree([said("a"), said("b"), said("c", 60), said("d", 60)], 2, 3, 101)
    assert agree([said("a"), said("b"), said("c", 60)], 2, 3, 101).brokers == ("a", "b")


def test_versions_are_a_vote_and_never_step_back() -> None:
    words = [said("a", version=3), said("b", version=4), said("c", version=4)]
    assert agree(words, 2, 3, 101).version == 4
    assert agree([*words[:2], said("c", version=3)], 2, 3, 101).version == 3
    assert agree([said("a", version=3), said("b", version=3), said("c", version=4)], 1, 3, 101).version == 4
    for behind in ([said("a", version=2), said("b", version=2)], [said("a", version=3), said("b", version=4)]):
        with pytest.raises(BrokersDisagree, match="fewer than 2"):
            agree(behind, 2, 3, 101)


WORDS = st.lists(
    st.tuples(st.integers(-40, 40), st.integers(1, 5), st.floats(0, 5, allow_nan=False)), min_size=0, max_size=7
)


@given(words=WORDS, needed=st.integers(1, 5), known=st.integers(1, 5))
def test_whatever_is_believed_k_brokers_have_said(words: list[tuple[int, int, float]], needed: int, known: int) -> None:
    brokers = [
        said(f"b{number}", seconds, version, asked=100 - took, heard=100)
        for number, (seconds, version, took) in enumerate(words)
    ]
    try:
        found = agree(brokers, needed, known, 100.0)
    except BrokersDisagree:
        return
    agreed = [word for word in brokers if word.broker in found.brokers]
    assert len(agreed) >= needed
    assert {word.version for word in agreed} == {found.version}
    assert found.version >= known
    assert max(word.earliest(100) for word in agreed) <= found.time
    for word in agreed:
        assert word.earliest(100) <= found.time <= word.latest(100) + SPREAD + timedelta(seconds=1)


@example(shift=-11)
@example(shift=12)
@given(shift=st.integers(-86_400, 86_400))
def test_one_liar_among_three_moves_nothing(shift: int) -> None:
    honest = [said("a"), said("b", 1)]
    found = agree([*honest, said("liar", shift, version=3)], 2, 3, 100.3)
    assert abs(found.time - NOON) <= SPREAD + timedelta(seconds=3)
    assert {"a", "b"} <= set(found.brokers)


def test_two_liars_who_share_no_clock_with_two_honest_brokers_leave_nothing_to_believe() -> None:
    with pytest.raises(BrokersDisagree):
        agree([said("a"), said("b", 4), said("liar", 900), said("accomplice", 900)], 2, 3, 100.3)


# --- the form of several EARs -----------------------------------------------------------------------------------------


def token(broker: str, **more: str) -> str:
    return sign_jws({"iss": broker, **more}, KEY, kid=broker, typ=TYPE)


def lines(*tokens: str) -> bytes:
    """What is compressed into a certificate."""
    parts = (one.split(".") for one in tokens)
    return b"".join(unb64url(part[1], where="t") + b"\n" + part[2].encode() + b"\n" for part in parts)


@given(st.lists(st.sampled_from([f"b{number}" for number in range(20)]), unique=True, min_size=1, max_size=MAX_EARS))
def test_ears_have_one_form_whatever_their_order(brokers: list[str]) -> None:
    raw = pack_ears([token(broker) for broker in brokers])
    assert raw == pack_ears([token(broker) for broker in reversed(brokers)])
    assert unpack_ears(raw) == tuple(token(broker) for broker in sorted(brokers))


def test_other_forms_are_refused() -> None:
    one, two = token("one"), token("two")
    good = lines(one, two)
    packed = zlib.compress(good)
    assert unpack_ears(packed) == (one, two)
    for bad in (
        b"",
        b"\n",
        lines(two, one),
        lines(one, one),
        good + b"\n",
        b"\n" + good,
        good[:-1],
        good.replace(b"\n", b"\r\n"),
        good.replace(b'{"iss"', b'{ "iss"'),
        good + b'{"iss":"x"}\n',
        b'{"iss":1}\n' + good.split(b"\n")[1] + b"\n",
        b"[]\n" + good.split(b"\n")[1] + b"\n",
        lines(*(token(f"b{number:02}") for number in range(MAX_EARS + 1))),
        lines(token("one", x="y" * MAX_EAR)),
        b"x" * MAX_EARS_SIZE,
        b"x" * 4_000_000,
    ):
        with pytest.raises(Unusable):
            unpack_ears(zlib.compress(bad))
    for bad in (packed[:-1], packed + b"x", b"", good, os.urandom(MAX_PACKED + 1)):
        with pytest.raises(Unusable):
            unpack_ears(bad)
    for tokens in ([one, one], [], [token("one", x=os.urandom(MAX_PACKED).hex())]):
        with pytest.raises(Unusable):
            pack_ears(tokens)


@given(st.binary(max_size=300))
def test_any_bytes_are_no_list_of_ears(raw: bytes) -> None:
    for data in (raw, zlib.compress(raw)):
        with pytest.raises(Unusable):
            unpack_ears(data)


# --- asking all -------------------------------------------------------------------------------------------------------


def test_those_who_hang_are_not_waited_for_once_enough_have_answered() -> None:
    release = threading.Event()

    def hang() -> int:
        release.wait(30)
        return 3

    begun = time.monotonic()
    answers, failures = ask_all({"a": lambda: 1, "b": hang, "c": lambda: 2}, seconds=20, enough=2, linger=0.1)
    release.set()
    assert answers == {"a": 1, "c": 2}
    assert isinstance(failures["b"], BrokerUnavailable)
    assert time.monotonic() - begun < 20


def test_a_fault_of_ours_is_no_brokers_failure() -> None:
    def fault() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask_all({"a": fault}, seconds=5)
