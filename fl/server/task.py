"""What passes between an algorithm, the federation of a job, and the job's sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fl.aggregation.mask_talk import Step
from fl.jobs.settings import TaskKind
from fl.model import ParamsType
from fl.tensors import TensorFile
from fl.transport.stored import Stored


@dataclass(frozen=True, slots=True)
class Task:
    """Do with the model of one round what `kind` says."""

    round: int
    total_rounds: int
    model: Stored
    kind: TaskKind = "train"


class Keeper(Protocol):
    """What keeps a job's state from round to round, so that it can go on after its server or its author stopped."""

    def saved(self) -> Saved | None:
        """Where the job stood, if it is to go on from there."""

    def save(self, saved: Saved) -> None:
        """Keep where the job stands; the memory stays the algorithm's."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a job stands between two rounds: the next one, its model, and what the algorithm remembers beside it.

    `state` holds the algorithm's own arrays (an optimizer's moments) by name; `judged` the best metric so far and the
    rounds since, if rounds are judged.
    """

    round: int
    model: Stored
    state: Mapping[str, Any]
    judged: Mapping[str, float]


@dataclass(slots=True)
class Update:
    """A site's admitted update. `close` gives its memory back."""

    site: str
    tensors: TensorFile
    memory: Stored
    params_type: ParamsType
    weight: float
    metrics: Mapping[str, float]

    def close(self) -> None:
        """Give the update's memory back."""
        self.tensors.release()
        self.memory.close()


class Site(Protocol):
    """A connected site, as its transport makes it. Its methods return at once."""

    @property
    def name(self) -> str:
        """The site's name, unique in the job."""

    def give(self, task: Task) -> None:
        """Give the site a task; the answer comes through `Federation.submit` or `Federation.lose`."""

    def say(self, round_: int, step: Step, body: str) -> None:
        """Say something of secure aggregation; the answer comes through `Federation.hear` or `Federation.lose`."""

    def end(self, why: str) -> None:
        """Tell the site that it is out of the job, or that the job is over."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a site answered to what it was asked."""

    site: str
    body: str


class Aggregation(Protocol):
    """Makes the next model of the updates of a round; `result` ends one round, the next `fold` begins another."""

    def fold(self, update: TensorFile, weight: float, site: str = "", memory: Stored | None = None) -> None:
        """Add an admitted update with `weight` > 0. What is folded may be changed in the `memory` in which it lies."""

    def result(self, model: TensorFile) -> Stored:
        """The next global model, after `model`."""

    def close(self) -> None:
        """End it."""
