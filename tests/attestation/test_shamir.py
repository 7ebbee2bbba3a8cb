"""Sharing a secret: every k shares join, fewer say nothing, and what is no share is refused."""

from __future__ import annotations

import os
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.shamir import deal, invert, join, multiply
from policies.errors import Unusable


@given(st.binary(min_size=1, max_size=80), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_every_k_shares_join(secret: bytes, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    indices = data.draw(st.lists(st.integers(1, 255), min_size=n, max_size=n, unique=True))
    shares = deal(secret, k, indices, os.urandom)
    assert sorted(shares) == sorted(indices)
    for some in combinations(indices, k):
        assert join({index: shares[index] for index in some}) == secret


def test_a_whole_secret_of_64_kib() -> None:
    secret = os.urandom(64 * 1024)
    shares = deal(secret, 2, (1, 2, 3), os.urandom)
    assert join({1: shares[1], 3: shares[3]}) == secret
    assert all(share != secret for share in shares.values())


@pytest.mark.parametrize("secret", [0, 1, 0xFF])
def test_one_share_fewer_says_nothing(secret: int) -> None:
    """Over all polynomials, k-1 shares have every pair of values equally often, whatever the secret."""
    first = Counter(deal(bytes([secret]), 2, (1, 2), lambda _, draw=draw: bytes([draw]))[2] for draw in range(256))
    assert set(first.values()) == {1}
    assert len(first) == 256
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for one in range(256):
        for two in range(0, 256, 5):
            draws = iter((bytes([one]), bytes([two])))
            shares = deal(bytes([secret]), 3, (1, 2, 3), lambda _, draws=draws: next(draws))
            pairs[shares[1], shares[3]] += 1
    assert set(pairs.values()) == {1}


def test_too_few_or_wrong_shares_give_another_value() -> None:
    secret = os.urandom(32)
    shares = deal(secret, 3, (1, 2, 3, 4), os.urandom)
    assert join({1: shares[1], 2: shares[2]}) != secret
    wrong = bytes([shares[2][0] ^ 1]) + shares[2][1:]
    assert join({1: shares[1], 2: wrong, 3: shares[3]}) != secret
    assert join({1: shares[1], 2: shares[4], 4: shares[2]}) != secret


@pytest.mark.parametrize("indices", [(), (0, 1), (1, 1), (1, 256), (-1, 2)])
def test_indices_that_are_none(indices: tuple[int, ...]) -> None:
    with pytest.raises(Unusable):
        deal(b"secret", 1, indices, os.urandom)
    if len(set(indices)) == len(indices):
        with pytest.raises(Unusable):
            join(dict.fromkeys(indices, b"share"))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_k_that_can_never_be(k: int) -> None:
    with pytest.raises(Unusable):
        deal(b"secret", k, (1, 2, 3), os.urandom)


def test_what_cannot_be_shared_or_joined() -> None:
    with pytest.raises(Unusable):
        deal(b"", 1, (1,), os.urandom)
    with pytest.raises(Unusable):
        join({1: b"ab", 2: b"abc"})
    with pytest.raises(Unusable):
        join({1: b""})


@given(st.integers(1, 255), st.integers(0, 255), st.integers(0, 255))
def test_the_field(one: int, two: int, three: int) -> None:
    assert multiply(one, invert(one)) == 1
    assert multiply(two, three) == multiply(three, two)
    assert multiply(one, two ^ three) == multiply(one, two) ^ multiply(one, three)
    assert multiply(0x57, 0x83) == 0xC1  # FIPS 197, 4.2


def test_zero_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="inverse"):
        invert(0)
