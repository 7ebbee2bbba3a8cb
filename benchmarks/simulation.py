"""Seconds of simulations: a small PyTorch job from start to end as a process, and rounds of a hundred clients.

A hello job is two clients and two rounds of a small network on synthetic data, from the start of Python to its end. A
round of many clients runs from the first client's start of one to the first client's start of the next, as the clients
note it; each gives back 1 MB of random weights with something of its own added. Medians count.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.trials import ROOT, tell

HELLO_NETWORK = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

    def forward(self, rows):
        return self.layers(rows)
"""
HELLO_CLIENT = """
import torch
from network import Network
from fl import client as flare

rows = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
labels = (rows.sum(1) > 0).long()
flare.init()
while flare.is_running():
    network = Network()
    network.load_state_dict(flare.receive().params)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for batch in [slice(start, start + 32) for start in range(0, 512, 32)] * 2:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(rows[batch]), labels[batch]).backward()
        optimizer.step()
    accuracy = float((network(rows).argmax(1) == labels).float().mean())
    flare.send(flare.FLModel(params=network.state_dict(), metrics={"accuracy": accuracy}))
"""
HELLO_JOB = """
from network import Network
from fl import FedAvgRecipe, SimEnv

recipe = FedAvgRecipe(
    name="hello", min_clients=2, num_rounds=2, initial_model=Network(), train_script="client.py"
)
run = recipe.execute(SimEnv(num_clients=2, workspace_root="work"))
assert run.get_status() == "finished", run.get_status()
"""
MANY_CLIENT = """
import time
from fl import client as flare

flare.init()
own = int(flare.get_site_name().split("-")[1])
while flare.is_running():
    received = flare.receive()
    with open("TIMES", "a") as file:
        file.write(f"{received.current_round} {time.time()}\\n")
    flare.send(flare.FLModel(params={"w": received.params["w"] + 0.001 * own}))
"""
MANY_JOB = """
import numpy as np
from fl import FedAvgRecipe, SimEnv

weights = np.random.default_rng(7).standard_normal(250_000, dtype=np.float32)
recipe = FedAvgRecipe(
    name="many", min_clients=100, num_rounds=ROUNDS, initial_model={"w": weights}, train_script="client.py"
)
run = recipe.execute(SimEnv(num_clients=100, num_threads=8, workspace_root="work"))
assert run.get_status() == "finished", run.get_result()
"""


def measure(*, hellos: int = 5, rounds: int = 6) -> dict[str, float]:
    """Medians: the hello job, as a process, and a round of a hundred clients; and a hundred clients' whole job."""
    times = []
    for number in range(hellos):
        tell(f"simulation: hello job {number + 1} of {hellos}")
        times.append(hello())
    tell("simulation: a hundred clients")
    whole, gaps = many(rounds)
    return {
        "hello_job_seconds": statistics.median(times),
        "round_of_100_clients_seconds": statistics.median(gaps),
        "job_of_100_clients_seconds": whole,
    }


def hello() -> float:
    """Seconds of one hello job as a process."""
    return _run({"network.py": HELLO_NETWORK, "client.py": HELLO_CLIENT, "job.py": HELLO_JOB})[0]


def many(rounds: int) -> tuple[float, list[float]]:
    """Seconds of a job of a hundred clients as a process, and of its rounds."""
    return _run({"client.py": MANY_CLIENT, "job.py": MANY_JOB.replace("ROUNDS", str(rounds))})


def _run(files: Mapping[str, str]) -> tuple[float, list[float]]:
    """Seconds of `job.py` as a process, and between the beginnings of its rounds, if its clients note them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in files.items():
            (folder / path).write_text(text.replace("TIMES", str(folder / "times")))
        start = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "job.py"], cwd=folder, check=True, timeout=600, stdout=2, env=environment)
        seconds = time.perf_counter() - start
        first: dict[int, float] = {}
        noted = (folder / "times").read_text().split("\n") if (folder / "times").exists() else []
        for line in filter(None, noted):
            round_, at = line.split()
            first[int(round_)] = min(first.get(int(round_), float(at)), float(at))
        moments = [first[round_] for round_ in sorted(first)]
        return seconds, [after - before for before, after in itertools.pairwise(moments)]
