"""The fuzz targets of transport hold for good input and for simple damage, without a fuzzer."""

from __future__ import annotations

import pytest
from transport_seeds import SEEDS
from transport_targets import TARGETS


def test_every_target_of_transport_has_seeds() -> None:
    assert set(SEEDS) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_good_and_damaged_input(name: str) -> None:
    for seed in SEEDS[name]():
        for damaged in (seed, seed[:-1], seed[1:], seed + b"\0", b"", seed.replace(b"\0", b"\xff"), seed * 2):
            TARGETS[name](damaged)
        for position in range(len(seed)):
            TARGETS[name](seed[:position] + bytes([seed[position] ^ 0x55]) + seed[position + 1 :])
