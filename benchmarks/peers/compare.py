"""The same work here and by the peers that are installed, in one run, in turn; and a chart of it.

- a hello job: two simulated clients, two rounds of a small PyTorch network, as a process from its start to its end;
- a round of a hundred simulated clients with 1 MB of random weights (beside Flower alone: NVIDIA FLARE takes minutes);
- rounds of random weights at two sites over TLS, by gRPC here and at NVIDIA FLARE (Flower has HTTPS alone), and how
  long three rounds of 1 MB take from submission to result with all services running.

Medians count. A ratio above 1 says how many times slower the peer is. Memory is the sum of all processes' PSS.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from benchmarks import production, simulation
from benchmarks.peers import environments, flower, nvflare
from benchmarks.trials import ROOT, tell

CHART: Final = ROOT / "build" / "bench" / "peers.svg"
OURS: Final = "sealwright"
CLIENTS: Final = 100


def measure(
    *, megabytes: tuple[float, ...] = (10, 100), times: int = 3, peer_rounds: int = 4, many: bool = True
) -> dict[str, Any]:
    """Seconds by kind of work and who does it, and ratios to ours. Draws CHART. Raises RuntimeError without peers."""
    peers = environments.installed()
    if not peers:
        raise RuntimeError("no peer is installed: make bench-peers")
    found: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}

    def note(work: str, by: dict[str, float]) -> None:
        found[work] = by
        tell(f"peers: {work}: {', '.join(f'{who} {seconds:g} s' for who, seconds in by.items())}")

    note("hello job", _hello(peers, times))
    if many:
        note(f"round of {CLIENTS} simulated clients", _many(peers))
    for size in megabytes:
        by, memory[f"{size:g} MB"] = _rounds(peers, size, peer_rounds)
        note(f"round of {size:g} MB", by)
    note("submit to result", _submission(peers))
    ratios = {
        work: {who: round(seconds / by[OURS], 1) for who, seconds in by.items() if who != OURS}
        for work, by in found.items()
    }
    draw(found, CHART)
    return {"seconds": found, "times_slower": ratios, "pss_megabytes": memory, "versions": environments.VERSIONS}


def _hello(peers: list[str], times: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {who: [] for who in (OURS, *peers)}
    work: dict[str, Callable[[Path], float]] = {
        OURS: lambda _: simulation.hello(),
        "nvflare": lambda at: nvflare.simulate(at, "hello", clients=2, rounds=2, megabytes=0, threads=2)[0],
        "flower": lambda at: flower.simulate(at, "hello", clients=2, rounds=2, megabytes=0)[0],
    }
    for number in range(times):  # in turn, so that a busy moment strikes all of them
        for who, taken in seconds.items():
            tell(f"peers: hello job {number + 1} of {times}, {who}")
            taken.append(_in_folder(work[who]))
    return environments.medians(seconds)


def _many(peers: list[str]) -> dict[str, float]:
    tell(f"peers: {CLIENTS} clients, {OURS}")
    seconds = {OURS: simulation.many(rounds=6)[1]}
    if "flower" in peers:
        tell(f"peers: {CLIENTS} clients, flower")
        seconds["flower"] = _in_folder(
            lambda at: flower.simulate(at, "weights", clients=CLIENTS, rounds=6, megabytes=1)[1:]
        )
    return environments.medians(seconds)


def _rounds(peers: list[str], megabytes: float, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    tell(f"peers: rounds of {megabytes:g} MB, {OURS}")
    command = [sys.executable, "-m", "benchmarks.federation", str(megabytes), str(rounds), "grpc"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
    own = json.loads(done.stdout)
    seconds, memory = {OURS: [own["seconds"]]}, {OURS: own.get("all_pss_megabytes", 0.0)}
    for peer, federate in (("nvflare", nvflare.federate), ("flower", flower.federate)):
        if peer in peers:
            tell(f"peers: rounds of {megabytes:g} MB, {peer}")
            told = _in_folder(lambda at, run=federate: run(at, rounds=rounds, megabytes=megabytes))  # type: ignore[misc]
            seconds[peer], memory[peer] = told["rounds"], told["pss_megabytes"]
    return environments.medians(seconds), {who: round(value) for who, value in memory.items()}


def _submission(peers: list[str]) -> dict[str, float]:
    seconds = {OURS: [production.measure(jobs=3)["submit_to_result_seconds"]]}
    for peer, federate in (("nvflare", nvflare.federate), ("flower", flower.federate)):
        if peer in peers:
            tell(f"peers: submit to result, {peer}")
            told = _in_folder(lambda at, run=federate: run(at, rounds=3, megabytes=1))  # type: ignore[misc]
            seconds[peer] = [told["submit_to_result"]]
    return environments.medians(seconds)


def _in_folder(work: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as name:
        return work(Path(name))


def draw(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A bar for each measurement, as SVG; within one kind of work, the longest bar is the slowest."""
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for work, by in found.items():
        table = Table(title=f"{work}, seconds", box=None, title_justify="left", show_header=False, padding=(0, 1))
        table.add_column(width=14)
        table.add_column(width=64)
        table.add_column(justify="right", width=10)
        for who, seconds in by.items():
            colour = "green" if who == OURS else "red"
            table.add_row(who, Bar(max(by.values()), 0, seconds, color=colour), f"{seconds:.3g}")
        console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(path), title="The same work, in one run")


if __name__ == "__main__":
    sizes = tuple(float(word) for word in sys.argv[1:]) or (10.0, 100.0)
    json.dump(measure(megabytes=sizes), sys.stdout, indent=2)
    sys.stdout.write("\n")
