"""Dealing a value out and joining it: what k good shares give, and what is known of those that are not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.errors import BrokerUnavailable, SharesMissing
from attestation.split import (
    OVERHEAD,
    gather_shares,
    join_shares,
    judge_shares,
    kept_as,
    parse_share,
    share_commitment,
    split_value,
)
from policies.charter.layout import json_target, split_path
from policies.documents import Split, parse_document
from policies.errors import MalformedDocument, Refused, SealwrightError, Unusable

NAME = "acme-pharma/key/model"
BROKERS = ("one", "three", "two")


def deal(value: bytes = b"the model key", *, k: int = 2, generation: int = 1) -> tuple[Split, dict[str, bytes]]:
    return split_value(NAME, value, BROKERS, k, generation, os.urandom)


@given(st.binary(min_size=1, max_size=100), st.integers(2, 6), st.data())
@settings(max_examples=30, deadline=None)
def test_any_k_of_them_join(value: bytes, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(max(2, n // 2 + 1), n))
    names = [f"broker-{number}" for number in range(n)]
    split, shares = split_value(NAME, value, names, k, 3, os.urandom)
    assert parse_document(Split, split.to_bytes(), "split") == split
    for some in combinations(names, k):
        assert join_shares(split, {name: shares[name] for name in some}) == value
    with pytest.raises(SharesMissing, match=f"{k - 1} good shares, {k} are needed"):
        join_shares(split, {name: shares[name] for name in names[: k - 1]})


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (4, 2), (2, 3), (1, 1), (3, 0)])
def test_a_k_that_is_not_more_than_half_is_refused(n: int, k: int) -> None:
    with pytest.raises(Unusable, match="more than half"):
        split_value(NAME, b"x", [f"broker-{number}" for number in range(n)], k, 1, os.urandom)
    with pytest.raises(Unusable):
        split_value(NAME, b"x", ["one", "one", "two"], 2, 1, os.urandom)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 1},
        {"k": 4},
        {"brokers": ["one", "two", "three"]},
        {"brokers": ["one", "one", "two"]},
        {"generation": 0},
        {"type": "a.b"},
        {"commitments": {"one": "0" * 64}},
        {"more": 1},
    ],
)
def test_documents_that_are_none(changes: dict[str, object]) -> None:
    import rfc8785

    document = {**deal()[0].to_json(), **changes}
    with pytest.raises(MalformedDocument):
        parse_document(Split, rfc8785.dumps(document), "split")


def test_where_the_document_stands() -> None:
    assert split_path(NAME) == "members/acme-pharma/split/key.model.json"
    assert json_target("members/acme-pharma/split/key.model.json") == (
        Split,
        {"member": "acme-pharma", "type": "key", "tag": "model"},
    )
    assert split_path("acme-pharma/a.b/c") is None
    assert [kept_as(NAME, 0), kept_as(NAME, 7)] == [NAME, f"{NAME}#7"]


def test_a_false_share_is_named_and_the_others_join() -> None:
    split, shares = deal()
    lie = shares["two"][:-1] + bytes([shares["two"][-1] ^ 1])
    judged = judge_shares(split, {**shares, "two": lie, "stranger": shares["one"]})
    assert sorted(judged.good) == ["one", "three"]
    assert judged.against["two"] == "the share is not the one that the owner dealt"
    assert "gives stranger no share" in judged.against["stranger"]
    assert join_shares(split, {**shares, "two": lie}) == b"the model key"
    with pytest.raises(SharesMissing, match="two: the share is not the one"):
        join_shares(split, {"one": shares["one"], "two": lie})


def test_one_brokers_share_is_not_anothers() -> None:
    split, shares = deal()
    judged = judge_shares(split, {"one": shares["two"], "two": shares["one"], "three": shares["three"]})
    assert sorted(judged.against) == ["one", "two"]
    assert share_commitment(NAME, "one", shares["one"]) != share_commitment(
        "acme-pharma/key/other", "one", shares["one"]
    )


def test_generations_do_not_mix() -> None:
    old, before = deal(generation=1)
    new, after = deal(generation=2)
    mixed = {"one": before["one"], "two": after["two"], "three": after["three"]}
    judged = judge_shares(new, mixed)
    assert judged.against == {"one": "the share is of generation 1, the charter's is 2"}
    assert judged.false == (), "a broker that lags behind is no liar"
    assert join_shares(new, mixed) == b"the model key"
    with pytest.raises(SharesMissing, match="generation"):
        join_shares(old, mixed)


def test_two_deals_of_one_generation_do_not_mix_either() -> None:
    _, first = deal()
    split, second = deal()
    assert judge_shares(split, {**second, "one": first["one"]}).false == ("one",)


def test_a_share_says_nothing_of_its_value_to_the_charters_readers() -> None:
    """The commitment is over 32 secret random bytes: the same value is committed to differently each time."""
    first, _ = deal()
    second, _ = deal()
    assert not set(first.commitments.values()) & set(second.commitments.values())


@pytest.mark.parametrize("raw", [b"", b"seal-share-1\0", bytes(OVERHEAD + 1), b"seal-share-1\0" + bytes(41)])
def test_what_is_no_share(raw: bytes) -> None:
    with pytest.raises(Unusable):
        parse_share(raw)
    split, shares = deal()
    assert judge_shares(split, {**shares, "one": raw}).false == ("one",)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    split, shares = deal()
    assert join_shares(split, {**shares, "one": raw}) == b"the model key"


def asker(shares: Mapping[str, bytes], failing: Mapping[str, SealwrightError], asked: list[str]) -> object:
    def ask(names: Sequence[str]) -> tuple[dict[str, bytes], dict[str, SealwrightError]]:
        asked.extend(names)
        return (
            {name: shares[name] for name in names if name not in failing},
            {name: failing[name] for name in names if name in failing},
        )

    return ask


DOWN = BrokerUnavailable("no answer", where="brokers")
DENIED = Refused("no", where="key", do="-", reasons=("the policy says no",))


@pytest.mark.parametrize(
    ("failing", "asked"),
    [({}, ["one", "three"]), ({"one": DOWN}, ["one", "three", "two"]), ({"three": DENIED}, ["one", "three", "two"])],
)
def test_no_more_brokers_are_asked_than_it_takes(failing: dict[str, SealwrightError], asked: list[str]) -> None:
    split, shares = deal()
    seen: list[str] = []
    found = gather_shares(split, BROKERS, asker(shares, failing, seen))  # type: ignore[arg-type]
    assert (found.value, dict(found.false), seen) == (b"the model key", {}, asked)


def test_whoever_failed_is_named() -> None:
    split, shares = deal()
    with pytest.raises(BrokerUnavailable) as waiting:
        gather_shares(split, ("one", "two"), asker(shares, {"one": DOWN}, []))  # type: ignore[arg-type]
    assert waiting.value.reasons == (
        f"{NAME}: 1 good shares, 2 are needed",
        "one: no answer",
        "three: it has not affirmed this guest",
    )
    with pytest.raises(SharesMissing) as refused:
        gather_shares(split, BROKERS, asker(shares, {"one": DENIED, "two": DENIED}, []))  # type: ignore[arg-type]
    assert refused.value.reasons[1:] == ("one: the policy says no", "two: the policy says no")
