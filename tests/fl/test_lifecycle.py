"""Networks are cut, sites die, the server is killed: the job goes on, and counts nothing twice."""

from __future__ import annotations

import contextlib
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
from fl.server.federation import Task
from fl.server.job import RemoteSite
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
    bundle, first = make_job(folder, SLOW, initial_model={"w": model}, **{"round_seconds": 150, **settings})
    world.approve(bundle)
    world.way = {"driver": driver}
    try:
        with (
            passing_proxy(server) as proxy,
            world.site(server, SITES[0], number=1.0),
            world.site(proxy.address, SITES[1], number=3.0, patience=150.0),
            world.client(server) as client,
        ):
            mine = client.submit(bundle, first, roster=None, recipients=[ADA])
            events = []
            for event in client.watch(mine, timeout=180):
                events.append(event)
                act(event, proxy)
            result = client.download(mine, folder / "result", ledgers=None)
    finally:
        world.way = {}
    return events, load_file(result / "model.safetensors")["w"], proxy


def kinds(events: list[JobEvent]) -> list[str]:
    return [event.kind for event in events]


SECONDS = [1.0, pytest.param(60.0, marks=pytest.mark.long)]
"""How long a network is away. What a second shows, a minute shows with every bound of its own length."""


@pytest.mark.parametrize("driver", ["grpc", "https"])
@pytest.mark.parametrize("how", ["cut", "hole"])
@pytest.mark.parametrize("seconds", SECONDS)
def test_a_network_that_is_away_costs_its_time_and_nothing_else(
    world: FederationWorld, server: str, tmp_path: Path, driver: str, how: str, seconds: float
) -> None:
    """A cut ends connections and refuses new ones; a black hole swallows what is said and ends nothing."""

    def act(event: JobEvent, proxy: Proxy) -> None:
        if event.kind == "update" and event.round == 0 and event.site == SITES[1]:
            proxy.cut() if how == "cut" else proxy.flows.clear()
            threading.Timer(seconds, proxy.mend if how == "cut" else proxy.flows.set).start()

    events, found, _ = run_with(world, server, tmp_path, driver, act, num_rounds=2)
    assert found.tolist() == [4.0] * 3
    if how == "cut":
        assert "paused" in kinds(events)
    assert kinds(events).count("paused") == kinds(events).count("resumed")
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


@pytest.mark.parametrize("driver", ["grpc", pytest.param("https", marks=pytest.mark.long)])
def test_a_round_goes_on_without_a_site_that_nobody_needs_and_takes_it_back(
    world: FederationWorld, server: str, tmp_path: Path, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl.server.absences.MISSED_SECONDS", 0.5)

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


def test_a_straggler_is_left_at_the_deadline(world: FederationWorld, server: str, tmp_path: Path) -> None:
    slow = SLOW.replace("time.sleep(0.5)", "time.sleep(60 if add > 2 else 0.1)")
    bundle, first = make_job(tmp_path, slow, num_rounds=2, min_clients=1, round_seconds=3)
    world.approve(bundle)
    with (
        first,
        world.site(server, SITES[0], number=1.0),
        world.site(server, SITES[1], number=3.0),
        world.client(server) as client,
    ):
        mine = client.submit(bundle, first, roster=None, recipients=[ADA])
        events = list(client.watch(mine, timeout=60))
        result = client.download(mine, tmp_path / "result", ledgers=None)
    assert ("lost", SITES[1], "did not answer within 3 s") in [(one.kind, one.site, one.text) for one in events]
    assert load_file(result / "model.safetensors")["w"].tolist() == [2.0] * 3  # of the site that came in time


def test_a_site_that_died_is_replaced_by_a_new_guest_of_its_name(
    world: FederationWorld, server: str, tmp_path: Path
) -> None:
    """Its machine is gone in the middle of a round; the job waits, and goes on with the guest that its host starts."""
    bundle, first = make_job(tmp_path, SLOW, num_rounds=3, round_seconds=60)
    world.approve(bundle)
    with (
        contextlib.ExitStack() as replacement,
        first,
        passing_proxy(server) as proxy,
        world.site(server, SITES[0], number=1.0),
        world.site(proxy.address, SITES[1], number=3.0, patience=0.5),
        world.client(server) as client,
    ):
        mine = client.submit(bundle, first, roster=None, recipients=[ADA])
        events = []
        for event in client.watch(mine, timeout=90):
            events.append(event)
            if event.kind == "round" and event.round == 1:
                proxy.cut()
            if event.kind == "paused":
                replacement.enter_context(world.site(server, SITES[1], number=3.0))
        result = client.download(mine, tmp_path / "result", ledgers=None)
    assert events[-1].text == "finished", events
    assert {event.site for event in events if event.kind == "paused"} == {SITES[1]}
    assert load_file(result / "model.safetensors")["w"].tolist() == [6.0] * 3
    counted = sorted((event.round, event.site) for event in events if event.kind == "update")
    assert counted == [(round_, site) for round_ in range(3) for site in sorted(SITES)]


def test_jobs_run_side_by_side_on_the_same_sites(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is in the middle of its rounds until two others have begun and ended."""
    script, others_over, honest = SLOW.replace("0.5", "0"), threading.Event(), RemoteSite.give
    slow, first = make_job(tmp_path, script, name="slow", num_rounds=2, round_seconds=60)
    (tmp_path / "quick").mkdir()
    quick, second = make_job(tmp_path / "quick", script, name="quick", num_rounds=1)

    def give(site: RemoteSite, task: Task) -> None:
        if task.total_rounds == 2 and task.round == 1:
            others_over.wait(60)
        honest(site, task)

    monkeypatch.setattr(RemoteSite, "give", give)
    world.approve(slow)
    world.approve(quick)
    with (
        first,
        second,
        world.site(server, SITES[0], number=1.0),
        world.site(server, SITES[1], number=3.0),
        world.client(server) as client,
    ):
        long_one = client.submit(slow, first, roster=None, recipients=[ADA])
        assert wait_until(lambda: client.report(long_one).round is not None)
        short_ones = [client.submit(quick, second, roster=None, recipients=[ADA]) for _ in range(2)]
        for job in short_ones:
            assert list(client.watch(job, timeout=60))[-1].text == "finished"
        assert client.report(long_one).status.value == "running"
        others_over.set()
        assert list(client.watch(long_one, timeout=60))[-1].text == "finished"
        for job, expected in ((long_one, 4.0), (short_ones[0], 2.0), (short_ones[1], 2.0)):
            result = client.download(job, tmp_path / job, ledgers=None)
            assert load_file(result / "model.safetensors")["w"].tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("driver", "when"),
    [
        ("grpc", "updated"),
        ("https", "training"),
        pytest.param("grpc", "training", marks=pytest.mark.long),
        pytest.param("https", "updated", marks=pytest.mark.long),
    ],
)
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


@pytest.mark.parametrize(
    "when", ["summed", *(pytest.param(one, marks=pytest.mark.long) for one in ("begun", "updated"))]
)
def test_a_killed_server_goes_on_at_the_round_under_fresh_masks(tmp_path: Path, when: str) -> None:
    """SIGKILL in round 1 of a masked job: while keys are exchanged, when one update has come under masks that are lost
    with the server, and when the sum is unmasked and not kept. Each site gives the same update once more."""
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_server.py"), str(tmp_path), "grpc", when, "masked"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] is True
    assert found["status"] == "finished", found
    assert found["model"] == pytest.approx([6.0] * 3, abs=1e-5)
    assert found["updates"] == [[round_, sorted(SITES)] for round_ in (0, 1, 2)]
    assert [entry for entry in found["ledger"] if entry == "resumed"] == ["resumed"]
    # No round was trained twice, and none let more out than it was debited for: its bits once for each site.
    assert sorted(found["exports"]) == [[True, round_] for round_ in (0, 1, 2) for _ in SITES]
