"""One task of a job between the calls of a trainer: loaded once, evaluated perhaps, answered once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fl import client
from fl.model import MAX_METRICS, WEIGHT_KEY, FLModel

T = TypeVar("T")


class TrainerRound:
    """The task that is open, for adapters of trainers whose `train` and `evaluate` work on one torch module."""

    def __init__(self) -> None:
        self._received: FLModel | None = None
        self._metrics: dict[str, float] = {}
        self._own: dict[str, Any] = {}
        self._training = False

    def evaluate(
        self, module: Any, run: Callable[[], T], metrics: Callable[[T], Mapping[str, Any]], *, nothing: T
    ) -> T:
        """Evaluate the task's model by `run`; that answers an evaluation. Inside training it is the trainer's own.

        Where the site's own model is asked for, or the task is answered, `nothing` is evaluated.
        """
        if self._training:
            return run()
        if client.is_submit_model() or not self._load(module):
            return nothing
        found = run()
        self._metrics = numbers(metrics(found))
        if client.is_evaluate():
            self._answer(FLModel(metrics=self._metrics))
        return found

    def train(self, module: Any, run: Callable[[], T], told: Callable[[T], tuple[int, Mapping[str, Any]]]) -> T | None:
        """Train the task's model by `run` and answer; `told` gives its steps and metrics.

        The answer's metrics are of the model that was received, if it was evaluated, or else those of training.
        Returns None where there was nothing to train.
        """
        if client.is_submit_model():
            if self._load(module):
                self._answer(FLModel(params=self._own))
            return None
        if not client.is_train() or not self._load(module):
            return None
        self._training = True
        try:
            found = run()
        finally:
            self._training = False
        steps, metrics = told(found)
        self._own = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        shown = self._metrics or numbers(metrics)
        self._answer(FLModel(params=self._own, metrics=shown, meta={WEIGHT_KEY: max(1, steps)}))
        return found

    def _load(self, module: Any) -> bool:
        """Load the open task's model, once; whether there is one."""
        if self._received is None:
            self._received = client.open_model()
            if self._received is not None and not client.is_submit_model():
                module.load_state_dict(self._received.params)
        return self._received is not None

    def _answer(self, model: FLModel) -> None:
        client.send(model)
        self._received, self._metrics = None, {}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of `metrics` that are finite numbers, at most as many as may travel."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number) and len(found) < MAX_METRICS:
            found[str(name)] = number
    return found
