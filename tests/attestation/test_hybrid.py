"""Sealing to a hybrid key: opens for its key and purpose, and for nothing else."""

from __future__ import annotations

import pytest

from attestation.hybrid import PRIVATE_SIZE, PUBLIC_SIZE, HybridPrivateKey, seal
from policies.errors import Refused, Unusable


def test_opens_with_its_own_key_read_back_from_bytes() -> None:
    key = HybridPrivateKey.generate()
    sealed = seal(b"weights", key.public_bytes(), info=b"result")
    again = HybridPrivateKey.from_bytes(key.private_bytes())
    assert again.open(sealed, info=b"result") == b"weights"
    assert (len(key.public_bytes()), len(key.private_bytes())) == (PUBLIC_SIZE, PRIVATE_SIZE)


def test_another_key_another_purpose_or_a_changed_byte_opens_nothing() -> None:
    key = HybridPrivateKey.generate()
    sealed = seal(b"weights", key.public_bytes(), info=b"result")
    with pytest.raises(Refused):
        HybridPrivateKey.generate().open(sealed, info=b"result")
    with pytest.raises(Refused):
        key.open(sealed, info=b"release")
    for position in (0, 600, 1100, len(sealed) - 1):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(Refused):
            key.open(bytes(changed), info=b"result")
    for short in (b"", sealed[:-1], sealed[:1120]):
        with pytest.raises(Refused):
            key.open(short, info=b"result")


def test_keys_of_another_size_or_shape_are_unusable() -> None:
    with pytest.raises(Unusable):
        HybridPrivateKey.from_bytes(b"\0" * 10)
    with pytest.raises(Unusable):
        seal(b"x", b"\0" * 10, info=b"i")
    with pytest.raises(Unusable):
        seal(b"x", b"\xff" * PUBLIC_SIZE, info=b"i")
