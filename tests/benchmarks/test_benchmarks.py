"""Each benchmark runs at its smallest size and gives finite, positive figures. Nothing here judges how fast."""

from __future__ import annotations

import math
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from benchmarks import broker, edge_tree, federation, masking, production
from benchmarks.peers import compare
from benchmarks.peers.environments import Tagged, installed, rounds_noted


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


@pytest.mark.long
def test_the_tree_s_updates() -> None:
    found = edge_tree.measure(devices=20_000, updates=2000)
    assert all(math.isfinite(value) and value > 0 for value in figures(found))


@pytest.mark.long
def test_jobs_in_production() -> None:
    found = production.measure(jobs=1)
    assert all(math.isfinite(value) and value > 0 for value in found.values())


@pytest.mark.long
@pytest.mark.skipif(not installed(), reason="the peers' environments are not there (make bench-peers)")
def test_the_same_work_by_peers() -> None:
    found = compare.measure(megabytes=(1,), times=1, peer_rounds=2, many=False)
    assert set(found["seconds"]) == {"hello job", "round of 1 MB", "submit to result"}
    for by in found["seconds"].values():
        assert set(by) == {compare.OURS, *installed()}
        assert all(math.isfinite(value) and value > 0 for value in by.values())


def test_what_peers_start_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    start = "import subprocess, sys; print(subprocess.Popen(['sleep', '100'], start_new_session=True).pid)"
    with Tagged() as processes:
        processes.run([sys.executable, "-c", start], tmp_path, tmp_path / "log", seconds=30)
        left = int((tmp_path / "log").read_text())
        os.kill(left, 0)
        with pytest.raises(RuntimeError, match="it went wrong"):
            processes.run(
                [sys.executable, "-c", "raise SystemExit('it went wrong')"], tmp_path, tmp_path / "log", seconds=30
            )
    status = Path(f"/proc/{left}/status")
    assert not status.exists() or "zombie" in status.read_text()  # it has ended; perhaps nobody has asked how


def test_rounds_are_from_one_first_client_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "times").write_text("0 10.5\n0 10.0\n1 12.0\n1 13.0\n2 15.0\n")
    assert rounds_noted(tmp_path / "times") == [2.0, 3.0]


def test_the_chart_is_an_image_with_every_bar(tmp_path: Path) -> None:
    compare.draw({"hello job": {"sealwright": 2.0, "flower": 20.0}}, tmp_path / "new" / "chart.svg")
    text = "".join(ET.fromstring((tmp_path / "new" / "chart.svg").read_text()).itertext())  # noqa: S314 - our own
    assert {"hello", "sealwright", "flower"} <= set(text.replace("\xa0", " ").split())
