"""Logistic regression by Newton's method, second order and exact: a few rounds give what the pooled data would give.

Each round every site sends the gradient g_i and the Hessian H_i of its mean log-likelihood at the global weights
(`fl.local.newton.newton_update`), weighted by its number of records. The server's step, with g and H the weighted means
and an L2 penalty of l2/2 ||w||^2 on all weights but the intercept (the last one):

    w <- w + damping_factor (H + l2 I)^-1 (g - l2 w)

Where H is singular, as with separable classes and no penalty, the step is the least-squares one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import JobFailed, RecipeUnusable
from fl.guard.gate import MAX_MAGNITUDE
from fl.jobs.settings import JobSettings, NewtonOptions
from fl.model import tensors_of
from fl.recipes.fedavg import MeanOfMetrics
from fl.recipes.recipe import TrainingRecipe
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.tensors import encode
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored

MAX_FEATURES = 4096


class FedAvgLrRecipe(TrainingRecipe):
    """Logistic regression over all sites by Newton's method."""

    def __init__(
        self,
        *,
        name: str = "lr-newton",
        num_features: int,
        min_clients: int,
        num_rounds: int = 5,
        damping_factor: float = 1.0,
        l2: float = 0.0,
        train_script: str,
        train_args: str | Sequence[str] = "",
        round_seconds: int = 3600,
    ) -> None:
        """Arguments; the others are FedAvgRecipe's:

        - `num_features`: how many features a record has, without the intercept; at most 4096.
        - `damping_factor`: the part of each Newton step that is taken, above 0 and at most 1.
        - `l2`: the penalty on the mean log-likelihood; scikit-learn's `C` is 1 / (l2 n).

        Raises RecipeUnusable with the argument that is wrong.
        """
        if not 1 <= num_features <= MAX_FEATURES:
            raise RecipeUnusable(f"num_features is {num_features}, not 1 to {MAX_FEATURES}", where="num_features")
        size = num_features + 1
        super().__init__(
            "lr-newton",
            {"damping_factor": damping_factor, "l2": l2},
            {
                "name": name,
                "initial_model": {
                    "weights": np.zeros(size), "gradient": np.zeros(size), "hessian": np.zeros((size, size))
                },
                "min_clients": min_clients,
                "num_rounds": num_rounds,
                "train_script": train_script,
                "train_args": train_args,
                "round_seconds": round_seconds,
            },
        )  # fmt: skip


def newton(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run the rounds over `sites` from `model`, which is closed; a model of `weights` alone, the caller's to close.

    Raises JobFailed if a step leads nowhere finite; JobFailed and JobAborted as `Federation.train` does.
    """
    options = settings.options
    if not isinstance(options, NewtonOptions):
        raise ValueError("the settings are not those of Newton's method")
    mean = WeightedMean(sites.schema, sites.params_type)
    rounds = Rounds(sites, settings, model)
    model = rounds.model
    weights = model.tensors().array("weights").copy()
    penalty = np.full(weights.size, options.l2)
    penalty[-1] = 0.0
    for round_ in rounds:
        metrics = MeanOfMetrics()
        for update in sites.train(Task(round_, settings.num_rounds, model)):
            mean.fold(update.tensors, update.weight)
            metrics.add(update.metrics, update.weight)
            update.close()
        with mean.result(model.tensors()) as means:
            file = means.tensors()
            gradient, hessian = file.array("gradient").copy(), file.array("hessian").copy()
            del file
        step = np.linalg.lstsq(hessian + np.diag(penalty), gradient - penalty * weights, rcond=None)[0]
        weights = weights + options.damping_factor * step
        if not (np.abs(weights) <= MAX_MAGNITUDE).all():
            raise JobFailed(sites.job, (f"the step of round {round_} is not finite: the sites' Hessians are unusable",))
        following = SealedMemory.of(
            encode(tensors_of({"weights": weights, "gradient": gradient * 0, "hessian": hessian * 0}))
        )
        rounds.end(round_, metrics.result(), received=model, following=following)
        model.close()
        model = following
    model.close()
    return SealedMemory.of(encode(tensors_of({"weights": weights})))
