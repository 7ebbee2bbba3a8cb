"""FedOpt: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithms 1 and 2.

The mean difference of the sites' models from the global one is a pseudo-gradient, on which the server's optimizer acts:

    Delta_t = mean over sites of (x_i - x_t)
    SGD:    m_t = momentum m_{t-1} + Delta_t,               x_{t+1} = x_t + lr m_t
    Adam:   m_t = beta1 m_{t-1} + (1 - beta1) Delta_t,      x_{t+1} = x_t + lr m_t / (sqrt(v_t) + tau)
            v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2
    Yogi:   as Adam, but v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2)

As there, m_0 = 0, v_0 = tau^2, without bias correction. Sites train as in FedAvg; the mean is weighted by their steps.
Tensors of integers and booleans, which have no gradient, take the plain mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import numpy as np
import numpy.typing as npt

from fl.aggregation.weighted_mean import WeightedMean
from fl.jobs.settings import FedOptOptions, JobSettings
from fl.recipes.fedavg import MeanOfMetrics
from fl.recipes.recipe import TrainingArguments, TrainingRecipe
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.tensors import FLOATS, Schema
from fl.transport.stored import Stored


class FedOptRecipe(TrainingRecipe):
    """Federated averaging with an optimizer at the server: FedAvgM, FedAdam, FedYogi."""

    def __init__(
        self,
        *,
        optimizer: Literal["sgd", "adam", "yogi"] = "sgd",
        lr: float = 1.0,
        momentum: float = 0.9,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        **training: Unpack[TrainingArguments],
    ) -> None:
        """Arguments, with the paper's names; the others are FedAvgRecipe's:

        - `optimizer`: "sgd" (with `momentum`), "adam" or "yogi" (with `beta1`, `beta2`, `tau`).
        - `lr`: the server's learning rate, eta in the paper. "adam" and "yogi" want much less than 1: 0.01 or 0.1.
        - `tau`: how adaptive the step is; smaller is more.

        Raises RecipeUnusable with the argument that is wrong.
        """
        constants = {"lr": lr, "momentum": momentum, "beta1": beta1, "beta2": beta2, "tau": tau}
        super().__init__("fedopt", {"optimizer": optimizer, **constants}, training)


def fedopt(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run the rounds over `sites` from `model`, which is closed; the last global model, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does.
    """
    if not isinstance(settings.options, FedOptOptions):
        raise ValueError("the settings are not FedOpt's")
    optimizer = ServerOptimizer(settings.options, sites.schema)
    mean = WeightedMean(sites.schema, sites.params_type)
    rounds = Rounds(sites, settings, model)
    model = rounds.model
    optimizer.load(rounds.state)
    for round_ in rounds:
        metrics = MeanOfMetrics()
        for update in sites.train(Task(round_, settings.num_rounds, model)):
            mean.fold(update.tensors, update.weight, memory=update.memory)
            metrics.add(update.metrics, update.weight)
            update.close()
        following = mean.result(model.tensors(), step=optimizer.step)
        rounds.end(round_, metrics.result(), received=model, following=following, state=optimizer.state)
        model.close()
        model = following
    return model


class ServerOptimizer:
    """The optimizer's state, m and v, for every tensor of floats: float32 (float64 for F64), flat."""

    def __init__(self, options: FedOptOptions, schema: Schema) -> None:
        self._options = options
        adaptive = options.optimizer != "sgd"
        self._m: dict[str, npt.NDArray[Any]] = {}
        self._v: dict[str, npt.NDArray[Any]] = {}
        for name, spec in schema.items():
            if spec.dtype in FLOATS:
                dtype = np.float64 if spec.dtype == "F64" else np.float32
                self._m[name] = np.zeros(spec.elements, dtype=dtype)
                if adaptive:
                    self._v[name] = np.full(spec.elements, options.tau**2, dtype=dtype)

    @property
    def state(self) -> dict[str, npt.NDArray[Any]]:
        """m and v by `m/NAME` and `v/NAME`; the optimizer's own arrays, which the next step changes."""
        moments = {"m": self._m, "v": self._v}
        return {f"{kind}/{name}": array for kind, of in moments.items() for name, array in of.items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from an earlier `state`; from the beginning if it is empty."""
        if not state:
            return
        for key, array in self.state.items():
            np.copyto(array, state[key], casting="no")

    def step(self, name: str, start: int, current: npt.NDArray[Any], delta: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """x_{t+1} of one block of a tensor, from x_t (`current`) and Delta_t (`delta`); the state follows."""
        options = self._options
        m = self._m[name][start : start + current.size]
        if options.optimizer == "sgd":
            m *= options.momentum
            m += delta
            return current + options.lr * m
        m *= options.beta1
        m += (1 - options.beta1) * delta
        v = self._v[name][start : start + current.size]
        squared = delta * delta
        if options.optimizer == "adam":
            v *= options.beta2
            v += (1 - options.beta2) * squared
        else:
            v -= (1 - options.beta2) * squared * np.sign(v - squared)
        following: npt.NDArray[Any] = current + options.lr * m / (np.sqrt(v) + options.tau)
        return following
