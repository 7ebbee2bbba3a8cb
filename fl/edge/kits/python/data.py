"""What an app gives its device: where training data is, filters, and what it wants to hear of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from policies.errors import Refused

Arrays = dict[str, npt.NDArray[np.float32]]
Filter = Callable[[Arrays], Arrays]
"""Turns a model (before training) or a difference (before it is sent) into another with the same names and shapes."""
MAX_FILTERS: Final = 16
Event = Callable[[str, Mapping[str, Any]], None]
"""Hears of `joined`, `task`, `trained`, `dropped`, `reported`, `refused`, `waiting`, `over`, with details."""
Condition = Callable[[], str | None]
"""Why a device shall not work now (battery, network, use); None if it may."""


def named_filters(config: Mapping[str, Any], place: str, known: Mapping[str, Filter]) -> list[Filter]:
    """The filters that a task's configuration names under `place`, in their order; a list of names of at most
    MAX_FILTERS. Raises Refused for a name that the app does not have: nothing is loaded or guessed."""
    names = config.get(place, [])
    if not isinstance(names, list) or len(names) > MAX_FILTERS:
        names = [None]
    missing = [name for name in names if not isinstance(name, str) or name not in known]
    if missing:
        raise Refused(
            f"this app has no filter {missing[0]!s:.80} for {place}",
            where="task",
            do="Name filters that the app has, or give devices an app that has it.",
        )
    return [known[name] for name in names]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's inputs, float32 of the graph's input shape, and labels, int64 or float32 as the graph takes them."""

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[Any]


class Dataset(Protocol):
    """A device's examples for one job."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One pass over them, shuffled by `rng`, in batches of exactly `size`; what is left over is left out."""


class DataSource(Protocol):
    """Where an app's examples are."""

    def dataset(self, job: str, config: Mapping[str, Any]) -> Dataset:
        """The examples for the job of this name, with the task's configuration."""


@dataclass(frozen=True, slots=True)
class ArrayDataset:
    """Examples in memory: `inputs` and `labels` have one row each."""

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Shuffled batches of exactly `size`."""
        order = rng.permutation(len(self.inputs))
        for at in range(0, len(order) - size + 1, size):
            chosen = order[at : at + size]
            yield Batch(self.inputs[chosen], self.labels[chosen])
