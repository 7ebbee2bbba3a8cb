"""The peers' own environments, processes in them, and how much memory these take."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.trials import ROOT

PEERS: Final = ROOT / "build" / "peers"
VERSIONS: Final = {"nvflare": "NVIDIA FLARE 2.9.0", "flower": "Flower 1.42.0"}
_TAG: Final = "BENCH_TAG"


def installed() -> list[str]:
    """The peers whose environments are there."""
    return [name for name in VERSIONS if (PEERS / name / "bin" / "python").exists()]


def program(peer: str, name: str = "python") -> str:
    """A program of a peer's environment."""
    return str(PEERS / peer / "bin" / name)


class Tagged:
    """Processes that are found again, with all that they start, by a word in their environment.

    `with` it, memory is looked at twice a second; at the end whatever still runs is killed.
    """

    def __init__(self, **environment: str) -> None:
        self._word = f"bench-{uuid.uuid4().hex}"
        self.environment = {
            **os.environ,
            _TAG: self._word,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        self.most_pss = 0
        """KiB of all processes together."""
        self.most_processes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes():
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + 5
            while self._processes() and time.monotonic() < end:
                time.sleep(0.1)

    def run(self, command: Sequence[str], folder: Path, log: Path, *, seconds: float) -> float:
        """Run a command to its end; how many seconds it took. Raises RuntimeError with its log's end if it fails."""
        start = time.perf_counter()
        with log.open("ab") as file:
            done = subprocess.run(
                command, cwd=folder, env=self.environment, stdout=file, stderr=file, timeout=seconds, check=False
            )
        if done.returncode:
            raise RuntimeError(f"{command[:3]} ended with {done.returncode}: {log.read_text(errors='replace')[-2000:]}")
        return time.perf_counter() - start

    @contextmanager
    def started(self, command: Sequence[str], folder: Path, log: Path) -> Iterator[None]:
        """A command that goes on until the end of `with`."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=folder, env=self.environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            processes = self._processes()
            self.most_pss = max(self.most_pss, sum(map(_pss, processes)))
            self.most_processes = max(self.most_processes, len(processes))

    def _processes(self) -> list[int]:
        word = self._word.encode()
        return [int(one.parent.name) for one in Path("/proc").glob("[0-9]*/environ") if word in _bytes(one)]


def rounds_noted(times: Path) -> list[float]:
    """Seconds between the beginnings of rounds; each line of the file is a round and when a client began it."""
    first: dict[int, float] = {}
    for line in times.read_text().splitlines():
        round_, at = line.split()
        first[int(round_)] = min(first.get(int(round_), float(at)), float(at))
    moments = [first[round_] for round_ in sorted(first)]
    return [after - before for before, after in itertools.pairwise(moments)]


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: round(statistics.median(values), 3) for name, values in found.items() if values}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _pss(process: int) -> int:
    for line in _bytes(Path(f"/proc/{process}/smaps_rollup")).splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1])
    return 0
