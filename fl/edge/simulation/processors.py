"""What virtual devices train: a batch of devices at a time, each on data of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fl.edge.contract import Tensors
from fl.edge.settings import Settings
from fl.edge.simulation.population import Devices
from fl.errors import RecipeUnusable
from fl.tensors import Schema, TensorSpec

Floats = npt.NDArray[np.float32]
DataOf = Callable[[int], tuple[npt.NDArray[Any], npt.NDArray[Any]]]
"""A device's examples by its number: inputs and labels, one row each."""


@runtime_checkable
class TaskProcessor(Protocol):
    """How devices train; FLARE's `DeviceTaskProcessor`, for many devices at once. Copied into each worker process."""

    def setup(self) -> None:
        """Called once in each worker process."""

    def train(self, devices: Devices, model: Tensors, version: int) -> tuple[Tensors, npt.NDArray[np.float64]]:
        """Each device's difference from `model`, stacked along a first axis (float32), and each one's weight."""

    def shutdown(self) -> None:
        """Called once in each worker process at the end."""


class Skew(Settings):
    """Whose data: `samples` for each device; how unequal its classes are (Dirichlet's alpha; small is unequal)."""

    samples: int = Field(default=24, ge=1, le=10_000)
    alpha: float = Field(default=1.0, gt=0, le=1e6)


class LocalTraining(Settings):
    """Full-batch gradient descent: so many steps, with this learning rate."""

    steps: int = Field(default=10, ge=1, le=10_000)
    learning_rate: float = Field(default=0.5, gt=0, le=1e3)


@dataclass(frozen=True)
class Examples:
    """Features [n, d] (float32) and classes [n]."""

    x: Floats
    y: npt.NDArray[np.int64]

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.y.max()) + 1


def digits() -> tuple[Examples, Examples]:
    """scikit-learn's handwritten digits: four fifths to draw devices' data from, one fifth to test. RecipeUnusable."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RecipeUnusable(
            "the digits need scikit-learn", where="data", do="pip install 'sealwright[demo]'"
        ) from error
    found = load_digits()
    x, y = (found.data / 16).astype(np.float32), found.target.astype(np.int64)
    test = np.random.default_rng(0).permutation(len(y)) < len(y) // 5
    return Examples(x[~test], y[~test]), Examples(x[test], y[test])


class SoftmaxRegression:
    """Multinomial logistic regression `w` [d, c], `b` [c] on examples drawn for each device from a common pool.

    A device's classes are drawn from a Dirichlet distribution (Hsu et al. 2019), its examples from the pool's of those
    classes; both follow from the seed and the device's number, so that a device has the same data each time.
    """

    def __init__(self, pool: Examples, skew: Skew, training: LocalTraining, seed: int) -> None:
        self._pool = pool
        self._skew = skew
        self._training = training
        self._seed = seed
        self._of_class = [np.flatnonzero(pool.y == number) for number in range(pool.classes)]

    @property
    def schema(self) -> Schema:
        """The model's tensors."""
        features, classes = self._pool.x.shape[1], self._pool.classes
        return {"b": TensorSpec("F32", (classes,)), "w": TensorSpec("F32", (features, classes))}

    def first_model(self) -> Tensors:
        """Zeros."""
        return {name: np.zeros(spec.shape, np.float32) for name, spec in self.schema.items()}

    def setup(self) -> None:
        """Nothing is to be done."""

    def shutdown(self) -> None:
        """Nothing is to be done."""

    def data_of(self, devices: Devices) -> tuple[Floats, npt.NDArray[np.int64]]:
        """The devices' examples: features [devices, samples, d] and classes [devices, samples]."""
        rows = np.empty((devices.size, self._skew.samples), dtype=np.int64)
        classes = self._pool.classes
        for at, device in enumerate(devices.tolist()):
            generator = np.random.default_rng([self._seed, 5, device])
            shares = generator.dirichlet(np.full(classes, self._skew.alpha))
            drawn = generator.choice(classes, size=self._skew.samples, p=shares)
            places = generator.random(self._skew.samples)
            rows[at] = [
                self._of_class[one][int(place * len(self._of_class[one]))]
                for one, place in zip(drawn.tolist(), places.tolist(), strict=True)
            ]
        return self._pool.x[rows], self._pool.y[rows]

    def train(self, devices: Devices, model: Tensors, version: int) -> tuple[Tensors, npt.NDArray[np.float64]]:
        """Gradient descent of all devices at once: matrices in a batch."""
        x, y = self.data_of(devices)
        target = np.eye(self._pool.classes, dtype=np.float32)[y]
        w = np.repeat(model["w"][None].astype(np.float32), devices.size, axis=0)
        b = np.repeat(model["b"][None].astype(np.float32), devices.size, axis=0)
        rate = np.float32(self._training.learning_rate)
        transposed = x.transpose(0, 2, 1)
        for _ in range(self._training.steps):
            error = (softmax(x @ w + b[:, None]) - target) / np.float32(x.shape[1])
            w -= rate * (transposed @ error)
            b -= rate * error.sum(axis=1)
        weights = np.full(devices.size, float(self._skew.samples))
        return {"w": w - model["w"], "b": b - model["b"]}, weights


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return found


def accuracy(model: Mapping[str, npt.NDArray[Any]], test: Examples) -> float:
    """The part of the test examples that softmax regression puts into the right class."""
    return float(((test.x @ model["w"] + model["b"]).argmax(axis=1) == test.y).mean())
