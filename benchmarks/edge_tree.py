"""The tree of gateways: a million simulated devices, 100,000 updates of 100 KB aggregated, in bounded memory.

Devices, gateways, inner nodes and root are in one process, over virtual time: what is measured is what the tree does
for an update (claim, check, fold, hand up, sum, step), without network, sealing or training. Beside it stands the least
that an aggregation can do: add each update's float32 numbers, weighted, into one float64 sum. The other figure has the
devices train, too: logistic regression on scikit-learn's digits in a pool of processes. Rates of the first are by the
one process's own time, so that a busy machine does not change them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.trials import ROOT, tell
from fl.edge.contract import EdgeJob
from fl.edge.embedded import EmbeddedTree
from fl.edge.fedbuff import FedBuff
from fl.edge.settings import DeviceManagerConfig, EdgeSettings, ModelManagerConfig
from fl.edge.simulation.description import Description, simulate
from fl.edge.simulation.engine import Simulation
from fl.edge.simulation.population import Devices, Population, PopulationSettings
from fl.edge.simulation.report import last_accuracy
from fl.tensors import TensorSpec, encode
from fl.transport.memory import SealedMemory

NUMBERS = 25_600
"""float32 numbers of the model: 100 KB."""
SCHEMA = {"w": TensorSpec("F32", (NUMBERS,))}


def measure(*, devices: int = 1_000_000, updates: int = 100_000) -> dict[str, object]:
    """Both figures, each in a process of its own, so that its memory is its own."""
    found: dict[str, object] = {}
    for name in ("tree", "digits"):
        tell(f"edge_tree: {name}")
        argv = [sys.executable, "-m", "benchmarks.edge_tree", name, str(devices), str(updates)]
        result = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True)
        found[name] = json.loads(result.stdout)
    return found


class _Ready:
    """In a pool's place: devices whose updates are there already, one of a few for all."""

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self.updates = [generator.standard_normal(NUMBERS).astype(np.float32) for _ in range(16)]

    def train(
        self, devices: Devices, model: Mapping[str, Any], version: int
    ) -> Iterator[tuple[int, dict[str, Any], float]]:
        """A copy for each device, as a gateway has it from the network."""
        for at, device in enumerate(devices.tolist()):
            yield at, {"w": self.updates[device % len(self.updates)].copy()}, 1.0


def _tree(devices: int, updates: int) -> dict[str, float]:
    each = 1000
    settings = EdgeSettings(
        models=ModelManagerConfig(
            num_updates_for_model=each, max_model_version=1 + updates // each, global_lr=1.0, staleness_weight=True
        ),
        devices=DeviceManagerConfig(device_selection_size=2 * each),
    )
    first = SealedMemory.of(encode({"w": (SCHEMA["w"], bytes(4 * NUMBERS))}))
    population = Population(PopulationSettings.model_validate({"devices": devices, "speed": {"median_seconds": 20.0}}))
    buff = FedBuff(SCHEMA, first, settings, np.random.default_rng(1))
    ready = _Ready()
    simulation = Simulation(
        settings,
        population,
        ready,
        buff,
        lambda clock: EmbeddedTree(buff, EdgeJob("bench", "bench", "edge"), SCHEMA, depth=2, width=3, clock=clock),
        moment=2.0,
    )
    began = time.process_time()
    trace = simulation.run()
    seconds = time.process_time() - began
    counted = sum(row["updates"] for row in trace.versions)
    buff.close()
    bare = _bare(ready.updates, min(updates, 20_000))
    rate = counted / seconds
    return {
        "devices_registered": float(devices),
        "updates_in_models": float(counted),
        "updates_a_second": rate,
        "bare_sums_a_second": bare,
        "share_of_bare": rate / bare,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _bare(updates: list[np.ndarray], count: int) -> float:
    total = np.zeros(NUMBERS)
    began = time.process_time()
    for number in range(count):
        update = updates[number % len(updates)].copy()
        total += np.multiply(update, 1.5, dtype=np.float64)
    return count / (time.process_time() - began)


def _digits(devices: int, updates: int) -> dict[str, float | None]:
    description = Description.model_validate(
        {
            "population": {"devices": devices, "seed": 5},
            "models": {
                "num_updates_for_model": 200,
                "max_model_version": 1 + updates // 200,
                "global_lr": 1.0,
                "staleness_weight": True,
            },
            "selection": {"device_selection_size": 800},
            "evaluation": {"frequency": 50},
            "tree": {"moment_seconds": 5.0},
        }
    )
    began = time.perf_counter()
    trace = simulate(description, workers=len(os.sched_getaffinity(0)))
    seconds = time.perf_counter() - began
    return {
        "devices_registered": float(devices),
        "devices_that_contributed": float(trace.contributed),
        "updates_a_second": trace.outcomes["counted"] / seconds,
        "accuracy": last_accuracy(trace),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    what, devices, updates = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    json.dump((_tree if what == "tree" else _digits)(devices, updates), sys.stdout)
