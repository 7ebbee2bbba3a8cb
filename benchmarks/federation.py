"""Seconds of a hello job in SimEnv, and of rounds of random weights over mutual TLS, beside a bare loop.

A round runs from one aggregation to the next, as a user that watches sees them: two sites pull the model, their
sandboxed scripts send it back, the server checks and folds it. Server and sites are a process each. The limit: the same
bytes (each site's model down and update up, in 1 MiB messages) between two threads and a server process over TLS by the
driver's libraries alone (grpc; aiohttp with uvloop, and http.client), before the rounds in the same run. Medians count,
of the time on the wall and of the processor time of all processes, which other work on the machine changes less.

Memory is looked at five times a second or, where that takes long, less often: PSS and anonymous memory of the server's
process and PSS of all processes (the benchmark's own too), by /proc/PID/smaps_rollup; and by how much the machine's
memory files grew, of which PSS counts what is mapped alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.certificate import make_certificate
from benchmarks.drivers import BARE_ROUNDS, DRIVERS, SERVE_BARE, received, served
from benchmarks.trials import ROOT, load_trial, tell
from fl.jobs.bundle import make_bundle

LAYERS = 10
ECHO = """
from fl import client as flare
flare.init()
while flare.is_running():
    flare.send(flare.FLModel(params=flare.receive().params))
"""
HELLO = """
import numpy as np
from fl import FedAvgRecipe, SimEnv
recipe = FedAvgRecipe(name="hello", min_clients=2, num_rounds=2, train_script="client.py",
                      initial_model={"w": np.zeros(3, dtype=np.float32)})
run = recipe.execute(SimEnv(num_clients=2, workspace_root="work"))
assert run.get_status() == "finished", run.get_status()
"""


def measure(
    *, megabytes: tuple[float, ...] = (10, 100), rounds: int = 5, hellos: int = 3, drivers: tuple[str, ...] = DRIVERS
) -> dict[str, float | dict[str, float]]:
    """A hello job, and a round of each size (two sites), each size in a process of its own."""
    found: dict[str, float | dict[str, float]] = {"hello_job_seconds": _hello(hellos)}
    for size, driver in itertools.product(megabytes, drivers):
        tell(f"federation: rounds of {size:g} MB over {driver}")
        command = [sys.executable, "-m", "benchmarks.federation", str(size), str(rounds), driver]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
        found[f"round_of_{size:g}_MB_over_{driver}"] = json.loads(done.stdout)
    for driver in drivers:
        command = [sys.executable, "-m", "benchmarks.drivers", str(megabytes[-1]), str(rounds), driver]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
        found[f"driver_{driver}"] = json.loads(done.stdout)
    return found


def _hello(count: int) -> float:
    times = []
    for number in range(count):
        tell(f"federation: hello job {number + 1} of {count}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "client.py").write_text(ECHO)
            (Path(folder) / "job.py").write_text(HELLO)
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "job.py"], cwd=folder, check=True, timeout=120, stdout=2, env=_environment()
            )
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def rounds_of(megabytes: float, rounds: int, driver: str, release_seconds: int | None = None) -> dict[str, float]:
    """Median seconds of a round and of the bare loop, their ratio, the server's memory. Call it once in a process.

    `release_seconds`: what of a round leaves a site leaves at a multiple of so many seconds (time padding).
    """
    trial = load_trial("fl/federation_world.py", "federation_trial")
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        world = trial.found_federation(folder)
        world.way = {"driver": driver}
        count = max(1, int(megabytes * 1e6 / 4))
        weights = np.array_split(np.random.default_rng(7).standard_normal(count, dtype=np.float32), LAYERS)
        tensors = {f"layer{number}": layer for number, layer in enumerate(weights)}
        bundle, model = trial.make_job(folder, ECHO, initial_model=tensors, num_rounds=rounds + 1, round_seconds=600)
        del weights, tensors
        if release_seconds is not None:
            outputs = bundle.settings.outputs.model_copy(update={"release_seconds": release_seconds})
            bundle = make_bundle(folder / "code", bundle.settings.model_copy(update={"outputs": outputs}))
        world.approve(bundle)
        key, certificate = make_certificate()
        size = int(megabytes * 1e6)
        # All others are forked before grpc starts in this process: it does not live through a fork.
        bare = ends.enter_context(served(SERVE_BARE[driver], key, certificate, size))
        own = ends.enter_context(served(_serve_world, world))
        sites = [ends.enter_context(served(_play_site, world, name)) for name in trial.SITES]
        with BARE_ROUNDS[driver](int(received(bare)), certificate, size) as bare_round:
            bare_round()  # the first one connects
            spent = _processor_seconds()
            alone = statistics.median([bare_round() for _ in range(rounds)])
            bare_spent = (_processor_seconds() - spent) / rounds
        address, server = received(own)
        for site in sites:
            site.send(address)
        for site in sites:
            received(site)
        memory = _Memory(server)
        with world.client(address) as client, model:
            job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
            events = client.watch(job, timeout=800)
            marks = [(time.perf_counter(), _processor_seconds()) for event in events if event.kind == "aggregated"]
            if str(client.report(job).status.value) != "finished":
                raise RuntimeError(f"the job did not finish: {world.told}")
        most = memory.most()
    gaps = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(marks)]
    whole = statistics.median(seconds for seconds, _ in gaps)
    return {
        "seconds": whole,
        "bare_seconds": alone,
        "share_of_round": alone / whole,
        "processor_seconds": statistics.median(spent for _, spent in gaps),
        "bare_processor_seconds": bare_spent,
        **{f"{name}_megabytes": size * 1024 / 1e6 for name, size in most.items()},
    }


class _Memory:
    """The most that the server's process, and all processes of the benchmark together, had; in KiB."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._most = {"server_pss": 0, "server_anonymous": 0, "all_pss": 0, "shared": 0}
        self._shared = _shared_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        pause = 0.2
        while not self._over.wait(pause):
            start = time.perf_counter()
            server = _rollup(self._server)
            found = {
                "server_pss": server.get("Pss", 0),
                "server_anonymous": server.get("Anonymous", 0),
                "all_pss": sum(_rollup(one).get("Pss", 0) for one in _family(os.getpid())),
                "shared": _shared_memory() - self._shared,
            }
            self._most = {name: max(most, found[name]) for name, most in self._most.items()}
            pause = max(0.2, 20 * (time.perf_counter() - start))  # looking at many pages takes the rounds' time

    def most(self) -> dict[str, int]:
        """What was seen so far; it looks no more."""
        self._over.set()
        self._thread.join(5)
        return self._most


def _family(process: int) -> list[int]:
    """A process and all its descendants."""
    found = [process]
    for one in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


def _processor_seconds() -> float:
    """Of all processes of the benchmark so far."""
    ticks = 0
    for one in _family(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _rollup(process: int) -> dict[str, int]:
    """The fields of /proc/PID/smaps_rollup; none for a process that has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return {}


def _shared_memory() -> int:
    """KiB of all memory files of this machine, mapped or not."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


def _serve_world(pipe: Connection, world: Any) -> None:
    with world.server() as address:
        pipe.send((address, os.getpid()))
        pipe.recv()


def _play_site(pipe: Connection, world: Any, name: str) -> None:
    with world.site(pipe.recv(), name, patience=30.0):
        pipe.send("connected")
        pipe.recv()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("megabytes", type=float)
    parser.add_argument("rounds", type=int)
    parser.add_argument("driver", choices=DRIVERS)
    parser.add_argument("--release-seconds", type=int)
    chosen = parser.parse_args()
    json.dump(rounds_of(chosen.megabytes, chosen.rounds, chosen.driver, chosen.release_seconds), sys.stdout)
