"""SCAFFOLD: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1.

Sites whose data differ pull the model apart. Each site i keeps a control variate c_i, the direction in which its own
data pull, and the server keeps c, the mean of all; a site's steps are corrected by c - c_i (`fl.local.scaffold`).
The server, lines 16 and 17, with S the sites that answered, N all that began:

    x <- x + eta_g / |S| sum over S of (y_i - x)
    c <- c + 1 / N sum over S of (c_i+ - c_i)

Control variates travel as tensors beside the model's, named `scaffold.control/NAME`; the result has the model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy.typing as npt

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import RecipeUnusable
from fl.jobs.settings import JobSettings, ScaffoldOptions
from fl.local.scaffold import CONTROL
from fl.recipes.fedavg import MeanOfMetrics
from fl.recipes.recipe import InitialModel, TrainingArguments, TrainingRecipe
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.tensors import FLOATS, Buffer, TensorSpec
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored


class ScaffoldRecipe(TrainingRecipe):
    """Federated averaging with control variates, for sites whose data differ."""

    def __init__(self, *, lr: float = 1.0, **training: Unpack[TrainingArguments]) -> None:
        """`lr`: the server's step size, eta_g in the paper. The others are FedAvgRecipe's; `params_type` is "DIFF".

        Raises RecipeUnusable with the argument that is wrong.
        """
        if training.setdefault("params_type", "DIFF") != "DIFF":
            raise RecipeUnusable("SCAFFOLD's scripts send differences", where="params_type")
        super().__init__("scaffold", {"lr": lr}, training, more_tensors=control_variates)


def control_variates(
    model: InitialModel, tensors: Mapping[str, tuple[TensorSpec, Buffer]]
) -> dict[str, tuple[TensorSpec, Buffer]]:
    """Zeros for each parameter: a module's parameters (not its buffers), or every tensor of floats."""
    named = getattr(model, "named_parameters", None)
    names = [name for name, _ in named()] if callable(named) else list(tensors)
    if any(spec.dtype == "BOOL" for spec, _ in tensors.values()):
        raise RecipeUnusable("a tensor of booleans has no difference to send", where="initial_model")
    return {
        CONTROL + name: (tensors[name][0], bytes(tensors[name][0].size))
        for name in names
        if tensors[name][0].dtype in FLOATS
    }


def scaffold(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run the rounds over `sites` from `model`, which is closed; the last x, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does.
    """
    options = settings.options
    if not isinstance(options, ScaffoldOptions):
        raise ValueError("the settings are not SCAFFOLD's")
    everyone = len(sites.sites)
    mean = WeightedMean(sites.schema, sites.params_type)
    rounds = Rounds(sites, settings, model)
    model = _with_fresh_control_variates(rounds.model) if rounds.resumed else rounds.model
    for round_ in rounds:
        metrics = MeanOfMetrics()
        for update in sites.train(Task(round_, settings.num_rounds, model)):
            mean.fold(update.tensors, 1.0)  # the paper's mean is over sites, whatever their numbers of steps
            metrics.add(update.metrics, update.weight)
            update.close()
        part = mean.count / max(everyone, mean.count)

        def step(
            name: str, start: int, current: npt.NDArray[Any], delta: npt.NDArray[Any], part: float = part
        ) -> npt.NDArray[Any]:
            factor = part if name.startswith(CONTROL) else options.lr
            following: npt.NDArray[Any] = current + current.dtype.type(factor) * delta
            return following

        following = mean.result(model.tensors(), step=step)
        rounds.end(round_, metrics.result(), received=model, following=following)
        model.close()
        model = following
    with model:
        return without_control_variates(model)


def _with_fresh_control_variates(model: Stored) -> Stored:
    """`model`, which is closed, with c = 0: the sites' scripts have started anew and know of no c_i."""
    with model:
        file = model.tensors()
        fresh: dict[str, tuple[TensorSpec, Buffer]] = {
            name: (spec, bytes(spec.size) if name.startswith(CONTROL) else file.bytes_of(name))
            for name, spec in file.schema.items()
        }
        return SealedMemory.of_tensors(fresh)


def without_control_variates(model: Stored) -> Stored:
    """The model's own tensors alone, in new memory."""
    file = model.tensors()
    own: dict[str, tuple[TensorSpec, Buffer]] = {
        name: (spec, file.bytes_of(name)) for name, spec in file.schema.items() if not name.startswith(CONTROL)
    }
    return SealedMemory.of_tensors(own)
