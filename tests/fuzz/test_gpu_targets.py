"""The fuzz targets of GPU evidence hold for good evidence and for simple damage, without a fuzzer."""

from __future__ import annotations

import pytest
from gpu_seeds import SEEDS
from gpu_targets import TARGETS


def test_every_target_has_seeds() -> None:
    assert set(SEEDS) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_holds_for_good_and_damaged_evidence(name: str) -> None:
    for seed in SEEDS[name]():
        for damaged in (seed, seed[:-1], seed[1:], seed + b"\0", b"", seed.replace(b"A", b"\xff"), seed * 2):
            TARGETS[name](damaged)
        for position in range(0, len(seed), max(1, len(seed) // 40)):
            TARGETS[name](seed[:position] + bytes([seed[position] ^ 0x55]) + seed[position + 1 :])
