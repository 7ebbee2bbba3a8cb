"""Secure aggregation beside plain averaging: seconds of a round of five sites with a million numbers each.

Once as it is in use: a server and five attested sites, each a process of its own, sandboxed scripts, mutual TLS by
gRPC; a round runs from one aggregation to the next. Once in SimEnv, where one process plays server and sites: a round's
time is that of a longer job less a short one's, over the rounds between. Plain and masked jobs take turns, and medians
count. The first round, which has masks of 64 bits, is in neither.

And a round of a hundred sites of which ten drop out: its steps alone, without network or scripts.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trials import ROOT, load_trial, tell
from fl import FedAvgRecipe, SimEnv
from fl.aggregation.masking import MaskedSum, Participant, Round, majority

SCRIPT = """
import numpy as np
from fl import client as flare
flare.init()
while flare.is_running():
    received = flare.receive()
    flare.send(flare.FLModel(params={"w": received.params["w"] + np.float32(0.01)}))
"""
MEMBERS = ("borealis-hospital", "cygnus-bio", "acme-pharma")


def measure(
    *, numbers: int = 1_000_000, sites: int = 5, many: int = 100, rounds: int = 10, trials: int = 3
) -> dict[str, float | dict[str, float]]:
    """Plain and masked rounds, their ratio, and one round of many sites."""
    found: dict[str, float | dict[str, float]] = {}
    for name, one in (("attested", _attested), ("simulated", _simulated)):
        times: dict[bool, list[float]] = {False: [], True: []}
        for trial, secure in itertools.product(range(trials), times):
            tell(f"masking: {name}, {'masked' if secure else 'plain'}, {trial + 1} of {trials}")
            times[secure].append(one(numbers, sites, rounds, secure=secure))
        plain, masked = (statistics.median(values) for values in times.values())
        found[name] = {"plain_round_seconds": plain, "masked_round_seconds": masked, "ratio": masked / plain}
    tell(f"masking: {many} sites, a tenth of which drops out")
    return {**found, f"round_of_{many}_sites": _many(numbers, many)}


def _attested(numbers: int, sites: int, rounds: int, *, secure: bool) -> float:
    """In a process of its own: its children are forked before gRPC starts, which does not live through a fork."""
    command = [sys.executable, "-m", "benchmarks.masking", str(numbers), str(sites), str(rounds), str(int(secure))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return float(json.loads(done.stdout))


def attested_round(numbers: int, sites: int, rounds: int, secure: bool) -> float:
    """Median seconds from one aggregation to the next, the first one not counted. Call it once in a process."""
    trial = load_trial("fl/federation_world.py", "federation_trial")
    fork = multiprocessing.get_context("fork")
    names = [f"site-{number}" for number in range(sites)]
    with tempfile.TemporaryDirectory() as folder:
        world = trial.found_federation(Path(folder), dict(zip(names, itertools.cycle(MEMBERS), strict=False)))
        bundle, model = trial.make_job(
            Path(folder),
            SCRIPT,
            initial_model={"w": np.zeros(numbers, dtype=np.float32)},
            num_rounds=rounds + 2,
            min_clients=sites,
            round_seconds=600,
            secure_aggregation=secure,
        )
        world.approve(bundle, tuple(names))
        pipes, processes = [], []
        for name in ("", *names):
            pipe, end = fork.Pipe()
            process = fork.Process(target=_play, args=(end, world, name), daemon=True)
            process.start()
            pipes.append(pipe)
            processes.append(process)
        try:
            address = _received(pipes[0])
            for pipe in pipes[1:]:
                pipe.send(address)
            for pipe in pipes[1:]:
                _received(pipe)
            with world.client(address) as client, model:
                job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
                events = client.watch(job, timeout=500)
                ends = [time.perf_counter() for event in events if event.kind == "aggregated"]
                if str(client.report(job).status.value) != "finished":
                    raise RuntimeError(f"the job did not finish: {client.report(job).reasons}")
        finally:
            for pipe, process in zip(pipes, processes, strict=True):
                pipe.send("stop")
                process.join(20)
                if process.is_alive():
                    process.kill()
    return statistics.median(after - before for before, after in itertools.pairwise(ends[1:]))


def _play(pipe: Connection, world: Any, name: str) -> None:
    """The server, or a site of that name, until the pipe says something more."""
    if not name:
        with world.server() as address:
            pipe.send(address)
            pipe.recv()
        return
    with world.site(pipe.recv(), name, patience=30.0):
        pipe.send("ready")
        pipe.recv()


def _received(pipe: Any) -> str:
    if not pipe.poll(60):
        raise RuntimeError("a server or a site is not ready after a minute")
    return str(pipe.recv())


def _simulated(numbers: int, sites: int, rounds: int, *, secure: bool) -> float:
    def job(count: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "client.py").write_text(SCRIPT)
            recipe = FedAvgRecipe(
                name="masks",
                initial_model={"w": np.zeros(numbers, dtype=np.float32)},
                min_clients=sites,
                num_rounds=count,
                train_script=str(Path(folder) / "client.py"),
                secure_aggregation=secure,
            )
            begun = time.perf_counter()
            recipe.execute(SimEnv(num_clients=sites, workspace_root=Path(folder) / "runs")).get_result()
            return time.perf_counter() - begun

    return max(1e-6, (job(rounds + 1) - job(1)) / rounds)


def _many(numbers: int, count: int) -> dict[str, float]:
    """Seconds of one site's steps (the mean over all), and of the server's, with a tenth of the sites lost."""
    names = [f"s{number:03}" for number in range(count)]
    lost = set(names[:: max(1, count // (count // 10 or 1))][: count // 10])
    begun = time.perf_counter()
    sites = {name: Participant(name, os.urandom) for name in names}
    members = {name: name for name in names}
    round_ = Round(b"bench", {name: one.public_keys for name, one in sites.items()}, members, majority(count))
    total = MaskedSum(round_, [np.zeros(numbers, dtype=np.uint32)])
    dealt = {name: one.share(round_) for name, one in sites.items()}
    for name, shares in total.shares_for(dealt).items():
        sites[name].receive(shares)
    vector = np.arange(numbers, dtype=np.uint32)
    of_server = 0.0
    for name in names:
        if name not in lost:
            masked = vector.copy()
            sites[name].masks().add_to(masked)
            start = time.perf_counter()
            total.fold(name, [masked])
            of_server += time.perf_counter() - start
    survivors = total.survivors
    for name in survivors:
        sites[name].confirm(survivors)
    revealed = {name: sites[name].reveal(survivors) for name in survivors}
    of_sites = time.perf_counter() - begun - of_server
    start = time.perf_counter()
    (summed,) = total.unmask(revealed)
    of_server += time.perf_counter() - start
    if not np.array_equal(summed, vector * np.uint32(len(survivors))):
        sys.exit("the sum is wrong")
    return {"a_site_seconds": of_sites / count, "server_seconds": of_server}


if __name__ == "__main__":
    json.dump(attested_round(*(int(word) for word in sys.argv[1:4]), secure=sys.argv[4] == "1"), sys.stdout)
