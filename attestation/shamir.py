"""Shamir's secret sharing (Communications of the ACM 22(11), 1979), byte by byte over GF(2^8).

Each byte of the secret is the constant term of a random polynomial of degree k-1; the share of index x is its value at
x. Any k shares give the secret by Lagrange's formula at 0; fewer say nothing about it, whatever they are compared with.
The field is that of AES (x^8 + x^4 + x^3 + x + 1). Indices, and all that follows from them, are public: so every
multiplication is of a secret by a public constant, done for all bytes at once by shifts and exclusive ors of one long
number, and no table is looked up at a secret's value.

A share proves nothing by itself: who joins has to know that each is the one that was dealt (attestation.split).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Final

from policies.errors import Unusable

MAX_INDEX: Final = 255
_POLYNOMIAL: Final = 0x1B


def deal(secret: bytes, k: int, indices: Collection[int], randomness: Callable[[int], bytes]) -> dict[int, bytes]:
    """The shares of `secret` (bytes, at least one) by index, any `k` of which join to it.

    `randomness(n)` gives n secret random bytes. Raises Unusable for indices that are not distinct numbers from 1 to
    255 (0 would be the secret itself), or a k that is not between 1 and their number.
    """
    points = _points(indices)
    if not secret:
        raise Unusable("an empty secret cannot be shared", where="secret", do="Share at least one byte.")
    if not 1 <= k <= len(points):
        raise Unusable(f"{k} of {len(points)} shares can never join", where="shares", do="Choose k from 1 to n.")
    terms = [int.from_bytes(secret, "big")]
    terms += [int.from_bytes(randomness(len(secret)), "big") for _ in range(k - 1)]
    ones = _ones(len(secret))
    shares: dict[int, bytes] = {}
    for point in points:
        value = 0
        for term in reversed(terms):  # Horner's rule
            value = _times(value, point, ones) ^ term
        shares[point] = value.to_bytes(len(secret), "big")
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret whose shares these are: exactly k of them, all right. With a wrong one, or fewer, it is another value.

    Raises Unusable for no shares, indices that are none, or shares of different lengths.
    """
    points = _points(shares)
    lengths = {len(share) for share in shares.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise Unusable("the shares are not equally long", where="shares", do="Take those of one secret.")
    (length,) = lengths
    ones, secret = _ones(length), 0
    for point in points:
        weight = 1
        for other in points:
            if other != point:  # other / (other - point), and minus is plus in this field
                weight = multiply(weight, multiply(other, invert(other ^ point)))
        secret ^= _times(int.from_bytes(shares[point], "big"), weight, ones)
    return secret.to_bytes(length, "big")


def multiply(left: int, right: int) -> int:
    """The product of two elements, 0 to 255."""
    product = 0
    while right:
        product ^= left if right & 1 else 0
        left = (left << 1) ^ (0x100 | _POLYNOMIAL if left & 0x80 else 0)
        right >>= 1
    return product


@cache
def invert(element: int) -> int:
    """The inverse of an element, 1 to 255: its 254th power. Only indices, which are public, are inverted and kept."""
    if not 1 <= element <= MAX_INDEX:
        raise ValueError("0 has no inverse")
    power = 1
    for _ in range(254):
        power = multiply(power, element)
    return power


def _points(indices: Collection[int]) -> list[int]:
    points = list(indices)
    if not points or len(set(points)) != len(points) or not all(1 <= point <= MAX_INDEX for point in points):
        raise Unusable(
            "the shares' indices are not distinct numbers from 1 to 255", where="shares", do="Number them from 1."
        )
    return points


def _ones(length: int) -> int:
    """The number whose every byte is 1."""
    return int.from_bytes(b"\x01" * length, "big")


def _times(value: int, constant: int, ones: int) -> int:
    """Every byte of `value` times the public `constant`."""
    product = 0
    while constant:
        if constant & 1:
            product ^= value
        high = (value >> 7) & ones
        value = ((value & (ones * 0x7F)) << 1) ^ (high * _POLYNOMIAL)
        constant >>= 1
    return product
