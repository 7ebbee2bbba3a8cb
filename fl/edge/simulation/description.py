"""The description of a simulation: strict TOML, in full what it depends on. `simulate` runs it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field

from fl.edge.branch import bounds_of
from fl.edge.contract import EdgeJob
from fl.edge.embedded import EmbeddedTree
from fl.edge.fedbuff import FedBuff, Step
from fl.edge.settings import DeviceManagerConfig, DevicePrivacy, EdgeSettings, ModelManagerConfig, Settings
from fl.edge.simulation.engine import Simulation, Trace
from fl.edge.simulation.pool import TrainingPool
from fl.edge.simulation.population import Population, PopulationSettings
from fl.edge.simulation.processors import LocalTraining, Skew, SoftmaxRegression, accuracy, digits
from fl.guard.keystream import KEY_SIZE, Keystream
from fl.tensors import encode
from fl.transport.memory import SealedMemory
from policies.errors import Unusable

MAX_FILE: Final = 1 << 20


class Tree(Settings):
    """`depth` levels below the root, each node with `width` children, the lowest of them gateways; virtual seconds
    between two exchanges of a node with its parent."""

    depth: int = Field(default=2, ge=1, le=6)
    width: int = Field(default=3, ge=1, le=100)
    moment_seconds: float = Field(default=1.0, gt=0, le=3600)


class Evaluation(Settings):
    """Accuracy on the test examples every so many versions; the run ends when it is at least `stop_at`."""

    frequency: int = Field(default=1, ge=1, le=1_000_000)
    stop_at: float | None = Field(default=None, gt=0, le=1)


class Description(Settings):
    """All of a simulation. `models` and `selection` are `ModelManagerConfig` and `DeviceManagerConfig`."""

    name: str = Field(default="devices", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    population: PopulationSettings
    data: Skew = Skew()
    dataset: Literal["digits"] = "digits"
    training: LocalTraining = LocalTraining()
    models: ModelManagerConfig = ModelManagerConfig()
    selection: DeviceManagerConfig = DeviceManagerConfig()
    tree: Tree = Tree()
    evaluation: Evaluation = Evaluation()
    privacy: DevicePrivacy | None = None
    task_seconds: float = Field(default=600.0, gt=0, le=1e6)
    device_wait_timeout: float | None = Field(default=None, gt=0, le=1e7)
    most_seconds: float = Field(default=1e7, gt=0, le=1e9)

    @property
    def edge(self) -> EdgeSettings:
        """The job's settings."""
        return EdgeSettings(
            models=self.models,
            devices=self.selection,
            device_wait_timeout=self.device_wait_timeout,
            privacy=self.privacy,
            task_seconds=self.task_seconds,
        )


def read_description(path: Path) -> Description:
    """The description in a TOML file. Raises Unusable, RecipeUnusable with the field that is wrong."""
    try:
        raw = path.read_bytes()[: MAX_FILE + 1]
        if len(raw) > MAX_FILE:
            raise Unusable(f"the file has more than {MAX_FILE} bytes", where=str(path), do="Shorten it.")
        table = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}", where=str(path), do="Name a file.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise Unusable(f"it is not TOML: {error}", where=str(path), do="Correct it; docs/reference/edge.md.") from error
    return Description.model_validate(table)


def simulate(
    description: Description,
    *,
    workers: int,
    random: Callable[[int], bytes] = os.urandom,
    made: Callable[[Step, float | None], None] = lambda _step, _accuracy: None,
) -> Trace:
    """Run a simulation to its end. `random` makes the noise of a private one; `made` is told of each version.

    Raises RecipeUnusable, ScriptFailed.
    """
    pool_of_examples, test = digits()
    seed = description.population.seed
    processor = SoftmaxRegression(pool_of_examples, description.data, description.training, seed)
    schema, settings = processor.schema, description.edge
    first = encode({name: (schema[name], array.tobytes()) for name, array in processor.first_model().items()})
    noise = None if settings.privacy is None else Keystream(random(KEY_SIZE)).normal
    with TrainingPool(processor, schema, workers) as pool:
        buff = FedBuff(schema, SealedMemory.of(first), settings, np.random.default_rng([seed, 7]), noise)
        job = EdgeJob(
            description.name, description.name, "edge", {}, {}, bounds_of(settings), settings.devices.device_reuse
        )

        def tree(clock: Callable[[], float]) -> EmbeddedTree:
            return EmbeddedTree(
                buff,
                job,
                schema,
                depth=description.tree.depth,
                width=description.tree.width,
                clock=clock,
                task_seconds=settings.task_seconds,
                strategy=settings.devices.device_sampling_strategy,
                seed=seed,
            )

        def reached(step: Step, measured: float | None) -> str | None:
            made(step, measured)
            stop_at = description.evaluation.stop_at
            return "the accuracy is reached" if stop_at and measured is not None and measured >= stop_at else None

        try:
            return Simulation(
                settings,
                Population(description.population),
                pool,
                buff,
                tree,
                moment=description.tree.moment_seconds,
                evaluate=lambda model: accuracy(model, test),
                eval_frequency=description.evaluation.frequency,
                most_seconds=description.most_seconds,
                made=reached,
            ).run()
        finally:
            buff.close()
