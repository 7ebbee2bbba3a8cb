"""Each benchmark runs at its smallest size and gives finite, positive figures. Nothing here judges how fast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from benchmarks import broker, federation, masking


def figures(found: Mapping[str, object]) -> Iterator[float]:
    for value in found.values():
        if isinstance(value, Mapping):
            yield from figures(value)
        else:
            assert isinstance(value, float)
            yield value


def test_the_broker_s_flows() -> None:
    found = list(figures(broker.measure(guests=2, flows=8, batches=1)))
    assert found
    assert all(math.isfinite(value) and value > 0 for value in found)


def test_masked_rounds() -> None:
    found = list(figures(masking.measure(numbers=1000, sites=3, many=20, rounds=1, trials=1)))
    assert found
    assert all(math.isfinite(value) and value > 0 for value in found)


def test_the_federation_s_rounds() -> None:
    measured = federation.measure(megabytes=(0.1,), rounds=2, hellos=1)
    assert {"round_of_0.1_MB_over_https", "driver_grpc"} <= measured.keys()
    assert all(math.isfinite(value) and value >= 0 for value in figures(measured))
