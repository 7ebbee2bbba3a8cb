"""Virtual time over a population and a tree: devices ask, train, report or vanish; the tree exchanges every moment.

Nothing here depends on the machine: equal descriptions make equal traces. What devices do between two moments is told
at the next one. A device trains when it gets its task, and reports when its time is up, to any gateway, as behind a
load balancer.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fl.edge.contract import Tensors, Update, contribution_of
from fl.edge.embedded import EmbeddedTree
from fl.edge.fedbuff import FedBuff, Step
from fl.edge.settings import EdgeSettings
from fl.edge.simulation.pool import TrainingPool
from fl.edge.simulation.population import Devices, Population
from fl.tensors import parse

MAX_POINTS: Final = 100_000

Evaluate = Callable[[Mapping[str, npt.NDArray[Any]]], float]


@dataclass(slots=True)
class Trace:
    """What happened. Times are virtual seconds; `versions` has a row for each version that was made."""

    versions: list[dict[str, Any]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    """How reports ended, `vanished` devices among them."""
    staleness: Counter[int] = field(default_factory=Counter)
    first_accuracy: float | None = None
    seconds: float = 0.0
    ended: str = ""
    """Why it ended."""
    registered: int = 0
    contributed: int = 0
    """Devices of which at least one update was counted."""


class Simulation:
    """One run. `step` plays one moment; `run` plays to the end."""

    def __init__(
        self,
        settings: EdgeSettings,
        population: Population,
        pool: TrainingPool,
        buff: FedBuff,
        tree: Callable[[Callable[[], float]], EmbeddedTree],
        *,
        moment: float,
        evaluate: Evaluate | None = None,
        eval_frequency: int = 1,
        most_seconds: float = 1e9,
        made: Callable[[Step, float | None], str | None] = lambda _step, _accuracy: None,
    ) -> None:
        """`moment`: virtual seconds between exchanges. `tree` gets the virtual clock. `made` hears of each version
        and its accuracy, and may say why the run ends with it."""
        self._settings = settings
        self._population = population
        self._pool = pool
        self._buff = buff
        self.now = 0.0
        self._tree = tree(lambda: self.now)
        self._moment = moment
        self._evaluate = evaluate
        self._eval_frequency = eval_frequency
        self._most_seconds = most_seconds
        self._made = made
        self._generator = np.random.default_rng([population.settings.seed, 6])
        self._queue: list[tuple[float, int, int, int]] = []  # when, order, device, version
        self._trained: dict[int, tuple[Tensors, float]] = {}
        self._order = 0
        self._last_asked = 0.0
        self.trace = Trace(registered=population.size)

    def run(self, job_timeout: float | None = None) -> Trace:
        """Play until the last version is made, `made` ends it, no device asks for `device_wait_timeout`, the virtual or
        (`job_timeout`) the real time is up."""
        deadline = None if job_timeout is None else time.monotonic() + job_timeout
        trace = self.trace
        if self._evaluate is not None:
            trace.first_accuracy = self._accuracy()
        while not trace.ended:
            self.step()
            trace.ended = self._why_ended(deadline)
        trace.contributed = int(np.count_nonzero(self._population.contributions))
        return trace

    def _why_ended(self, deadline: float | None) -> str:
        """Why the run is over; empty if it is not."""
        wait = self._settings.device_wait_timeout
        if self.trace.ended:  # `made` has said so
            return self.trace.ended
        if self._buff.over:
            return "the last version is made"
        if wait is not None and self.now - self._last_asked >= wait:
            return f"no device asked for {wait:g} s"
        if self.now >= self._most_seconds:
            return "the virtual time is up"
        return "the job's time is up" if deadline is not None and time.monotonic() >= deadline else ""

    def step(self) -> None:
        """One moment."""
        self.now += self._moment
        self._report_due()
        self._ask()
        for step in self._tree.exchange():
            self._note(step)
        self.trace.seconds = self.now

    def _report_due(self) -> None:
        gateways = self._tree.gateways
        while self._queue and self._queue[0][0] <= self.now:
            _, _, device, version = heapq.heappop(self._queue)
            self._population.busy[device] = False
            done = self._trained.pop(device, None)
            if done is None:
                self.trace.outcomes["vanished"] += 1
                continue
            gateway = gateways[int(self._generator.integers(len(gateways)))]
            name = contribution_of(gateway.branch.job, version, str(device))
            verdict = gateway.branch.add(Update(version, done[0], done[1], name))
            self.trace.outcomes[verdict.partition(":")[0]] += 1
            if verdict == "counted":
                self._population.contributions[device] += 1
            elif verdict == "busy":
                self._population.busy[device] = True
                self._trained[device] = done
                self._push(self.now + self._moment, device, version)

    def _ask(self) -> None:
        """Idle devices ask for tasks: some more than there are places, so that the tree knows that they wait."""
        devices = self._settings.devices
        gateways = self._tree.gateways
        free = max(0, devices.device_selection_size - len(self._queue))
        asking = self._population.draw(free + len(gateways), self.now, self._buff.version, again=devices.device_reuse)
        if asking.size:
            self._last_asked = self.now
        takers: dict[int, list[int]] = {}
        for device, at in zip(asking.tolist(), self._generator.integers(len(gateways), size=asking.size), strict=True):
            version = gateways[at].branch.select(str(device))
            if version is not None:
                takers.setdefault(version.version, []).append(device)
        for number, chosen in takers.items():
            self._train(np.array(chosen, dtype=np.int64), number)

    def _train(self, devices: Devices, version: int) -> None:
        population = self._population
        population.busy[devices] = True
        population.last_version[devices] = version
        vanish = population.drops(devices, version)
        for device, seconds in zip(devices.tolist(), population.seconds(devices).tolist(), strict=True):
            self._push(self.now + seconds, device, version)
        staying = devices[~vanish]
        if staying.size:
            file = parse(self._buff.models[version].view, max_size=self._buff.models[version].size)
            model = {name: file.array(name) for name in file.schema}
            for at, tensors, weight in self._pool.train(staying, model, version):
                self._trained[int(staying[at])] = (tensors, weight)

    def _push(self, when: float, device: int, version: int) -> None:
        heapq.heappush(self._queue, (when, self._order, device, version))
        self._order += 1

    def _note(self, step: Step) -> None:
        accuracy = None
        if self._evaluate is not None and (step.version % self._eval_frequency == 0 or self._buff.over):
            accuracy = self._accuracy()
        self.trace.staleness.update(step.staleness)
        if len(self.trace.versions) < MAX_POINTS:
            self.trace.versions.append(
                {
                    "version": step.version,
                    "seconds": self.now,
                    "updates": step.updates,
                    "weight": step.weight,
                    "staleness": sum(tau * count for tau, count in step.staleness.items()) / step.updates,
                    "lost": sum(step.lost.values()),
                    "accuracy": accuracy,
                }
            )
        self.trace.ended = self.trace.ended or self._made(step, accuracy) or ""

    def _accuracy(self) -> float:
        newest = self._buff.models[self._buff.version]
        file = parse(newest.view, max_size=newest.size)
        return self._evaluate({name: file.array(name) for name in file.schema}) if self._evaluate else 0.0
