"""Networks are cut, sites die, the server is killed: the job goes on, and counts nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation, make_job, wait_until
from proxies import Proxy, passing_proxy
from safetensors.numpy import load_file

from fl.jobs.progress import JobEvent
from fl.transport.frames import CHUNK

ADA = "acme-pharma/ada"
HERE = Path(__file__).parent
SLOW = """
import time
import numpy as np
from fl import client as flare

flare.init()
add = float(flare.data_path("number.txt").read_text())
while flare.is_running():
    received = flare.receive()
    time.sleep(0.5)
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(add)}))
"""
MEGABYTES = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


def run_with(
    world: FederationWorld,
    server: str,
    folder: Path,
    driver: str,
    act: Callable[[JobEvent, Proxy], Any],
    *,
    size: int = 3,
    **settings: Any,
) -> tuple[list[JobEvent], np.ndarray[Any, Any], Proxy]:
    """Run a job of two sites, the second by way of a proxy; `act` is called with each event."""
    model = np.zeros(size, dtype=np.float32)
    bundle, first = make_job(folder, SLOW, initial_model={"w": model}, round_seconds=60, **settings)
    world.approve(bundle)
    world.way = {"driver": driver}
    try:
        with (
            passing_proxy(server) as proxy,
            world.site(server, SITES[0], number=1.0),
            world.site(proxy.address, SITES[1], number=3.0, patience=60.0),
            world.client(server) as client,
        ):
            mine = client.submit(bundle, first, roster=None, recipients=[ADA])
            events = []
            for event in client.watch(mine, timeout=120):
                events.append(event)
                act(event, proxy)
            result = client.download(mine, folder / "result", ledgers=None)
    finally:
        world.way = {}
    return events, load_file(result / "model.safetensors")["w"], proxy


def kinds(events: list[JobEvent]) -> list[str]:
    return [event.kind for event in events]


@pytest.mark.parametrize("driver", ["grpc", "https"])
def test_a_cut_between_two_words_costs_its_time_and_nothing_else(
    world: FederationWorld, server: str, tmp_path: Path, driver: str
) -> None:
    def act(event: JobEvent, proxy: Proxy) -> None:
        if event.kind == "update" and event.round == 0:
            proxy.cut()
            threading.Timer(1.0, proxy.mend).start()

    events, found, _ = run_with(world, server, tmp_path, driver, act, num_rounds=2)
    assert found.tolist() == [4.0] * 3
    assert "paused" in kinds(events)
    assert "resumed" in kinds(events)
    assert "lost" not in kinds(events)
    counted = [(event.site, event.round) for event in events if event.kind == "update"]
    assert sorted(counted) == [(site, round_) for site in sorted(SITES) for round_ in (0, 1)]


@pytest.mark.parametrize("driver", ["grpc", "https"])
def test_transfers_go_on_where_a_cut_has_ended_them(
    world: FederationWorld, server: str, tmp_path: Path, driver: str
) -> None:
    """Cuts in the middle of the model's way down and of the update's way up: less goes over the wire than twice."""
    bytes_of_model = MEGABYTES << 20
    cuts: list[int] = []

    def act(event: JobEvent, proxy: Proxy) -> None:
        if event.kind != "round":
            return

        def watch() -> None:
            for share in (0.6, 1.6):
                assert wait_until(lambda share=share: len(proxy.seen) > share * bytes_of_model, 60)  # type: ignore[misc]
                cuts.append(len(proxy.seen))
                proxy.cut()
                proxy.mend()

        threading.Thread(target=watch, daemon=True).start()

    events, found, proxy = run_with(world, server, tmp_path, driver, act, size=bytes_of_model // 4, num_rounds=1)
    assert np.array_equal(found, np.full(bytes_of_model // 4, 2, dtype=np.float32))
    assert len(cuts) == 2
    assert kinds(events).count("update") == 2
    assert "lost" not in kinds(events)
    # Once down and once up, and what was on its way when it was cut: buffers, and a chunk that was not whole.
    assert len(proxy.seen) < 2 * bytes_of_model + 2 * (12 << 20) + 2 * CHUNK


@pytest.mark.parametrize("driver", ["grpc", "https"])
def test_a_round_goes_on_without_a_site_that_nobody_needs_and_takes_it_back(
    world: FederationWorld, server: str, tmp_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.server.federation.MISSED_SECONDS", 0.5)

    def act(event: JobEvent, proxy: Proxy) -> None:
        if event.kind == "round" and event.round == 0:
            proxy.cut()
        if event.kind == "aggregated" and event.round == 0:
            proxy.mend()

    events, _, _ = run_with(world, server, tmp_path, driver, act, num_rounds=24, min_clients=1)
    counted = [(event.site, event.round) for event in events if event.kind == "update"]
    assert (SITES[0], 0) in counted
    assert (SITES[1], 0) not in counted
    assert any((SITES[0], round_) in counted and (SITES[1], round_) in counted for round_ in range(1, 24)), counted
    assert len(set(counted)) == len(counted)
    assert "lost" not in kinds(events)


def test_a_site_that_stops_says_so_and_is_not_waited_for(world: FederationWorld, server: str, tmp_path: Path) -> None:
    bundle, first = make_job(tmp_path, SLOW, num_rounds=2, min_clients=1, round_seconds=60)
    world.approve(bundle)
    with (
        first,
        world.site(server, SITES[0], number=1.0),
        world.site(server, SITES[1], number=3.0) as leaving,
        world.client(server) as client,
    ):
        mine = client.submit(bundle, first, roster=None, recipients=[ADA])
        events = []
        for event in client.watch(mine, timeout=60):
            events.append(event)
            if event.kind == "round" and event.round == 0:
                leaving.stop.set()
    assert ("lost", SITES[1], "the site stops") in [(event.kind, event.site, event.text) for event in events]
    assert events[-1].text == "finished"


@pytest.mark.parametrize("driver", ["grpc", "https"])
@pytest.mark.parametrize("when", ["training", "updated"])
def test_a_killed_server_goes_on_at_the_round(tmp_path: Path, driver: str, when: str) -> None:
    """SIGKILL in round 1, before or after an update of it has come; another process takes the folder and the port."""
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_server.py"), str(tmp_path), driver, when],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] is True
    assert found["status"] == "finished", found
    # Three rounds of a mean of +1 and +3, each once.
    assert found["model"] == [6.0, 6.0, 6.0]
    assert found["rounds"] == [0, 1, 2]
    # No script trained a round twice, and what was resent was counted once.
    for site in SITES:  # what was logged to the killed server while nobody watched, nobody knows
        trained = found["trained"][site]
        assert len(set(trained)) == len(trained)
        assert {0, 2} <= set(trained)
    assert found["updates"] == [[round_, sorted(SITES)] for round_ in (0, 1, 2)]
    assert [entry for entry in found["ledger"] if entry == "resumed"] == ["resumed"]
    assert found["left_in_store"] == []
    assert b"w" * 3 not in b"".join(path.read_bytes() for path in tmp_path.glob("kept/*"))
