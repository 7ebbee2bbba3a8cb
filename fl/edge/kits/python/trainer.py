"""How a device trains: the graph of its task, by ExecuTorch's own runtime.

The model's tensors are set into the graph's parameters, so that one graph serves every version.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl.edge.kits.python.data import Arrays, Dataset
from policies.errors import Refused, Unusable

_STARTING: Final = threading.Lock()
"""The runtime makes itself ready when it is first used, and writes of it through Python: two threads that begin at once
would wait for each other."""


class TrainingStopped(Exception):
    """The task is to be trained no further."""


class Trainer(Protocol):
    """Trains a model on a device's examples."""

    def train(
        self,
        graph: bytes,
        config: Mapping[str, Any],
        model: Arrays,
        dataset: Dataset,
        rng: np.random.Generator,
        go_on: Callable[[], None],
    ) -> Arrays:
        """The trained parameters of `model`, by its names. Calls `go_on` before each step, which raises
        TrainingStopped. Raises Refused or Unusable for a graph or a configuration with which it cannot."""


class TrainingParams(BaseModel):
    """What of a task's configuration the trainer reads, by NVIDIA FLARE's names; other entries are the app's."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    epoch: int = Field(default=1, ge=1, le=1000)
    batch_size: int = Field(ge=1, le=65536)
    lr: float = Field(gt=0, le=1e3)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)


def training_params(config: Mapping[str, Any]) -> TrainingParams:
    """What `config` says. Raises Unusable."""
    try:
        return TrainingParams.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise Unusable(
            f"the task's configuration: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where="device_training_params",
            do="Correct the recipe.",
        ) from error


class ExecuTorchTrainer:
    """Stochastic gradient descent over the task's graph (the package `executorch`)."""

    def train(
        self,
        graph: bytes,
        config: Mapping[str, Any],
        model: Arrays,
        dataset: Dataset,
        rng: np.random.Generator,
        go_on: Callable[[], None],
    ) -> Arrays:
        """See Trainer. Raises Refused for a graph whose parameters are not the model's."""
        import torch

        params = training_params(config)
        batches = dataset.batches(params.batch_size, rng)
        first = next(batches, None)
        if first is None:
            raise Refused(
                f"the device has {len(dataset)} examples, fewer than a batch of {params.batch_size}",
                where="training",
                do="Train with smaller batches, or leave this device out.",
            )
        with _STARTING:
            module, optimiser_of = _load(graph)
            # The program allocates its parameters when it runs first.
            module.forward_backward("forward", _tensors(first.inputs, first.labels))
        parameters = {name.removeprefix("net."): value for name, value in module.named_parameters().items()}
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        if shapes != {name: array.shape for name, array in model.items()}:
            raise Refused(
                "the graph's parameters are not the model's tensors", where="training", do="Export the graph anew."
            )
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(torch.from_numpy(np.array(model[name])))
        optimiser = optimiser_of(module.named_parameters(), params.lr, params.momentum, 0.0, params.weight_decay, False)
        for _ in range(params.epoch):
            for batch in dataset.batches(params.batch_size, rng):
                go_on()
                module.forward_backward("forward", _tensors(batch.inputs, batch.labels))
                optimiser.step(module.named_gradients())
        return {name: value.detach().numpy().copy() for name, value in parameters.items()}


def _tensors(*arrays: Any) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _load(graph: bytes) -> tuple[Any, Any]:
    """The program in `graph`, and what makes its optimiser. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ExecuTorch says that its training interface may change
            from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer

            return _load_for_executorch_for_training_from_buffer(graph), get_sgd_optimizer
    except ImportError as error:
        raise Unusable(
            "this device has no ExecuTorch", where="training", do="pip install 'sealwright[edge]'."
        ) from error
    except RuntimeError as error:
        raise Unusable("the graph cannot be loaded", where="training", do="Export it anew.") from error
