"""Federated statistics: what the records of all sites look like together, before anyone trains on them.

Two rounds. Sites send for each feature its count, sum and histogram (`fl.local.statistics`); then, with the mean m of
round one, the sum of squares about it, which keeps the variance exact where the mean is large:

    N = sum N_i     mean = sum S_i / N     variance = (sum_i sum (x - m)^2 - N (mean - m)^2) / (N - 1)

Each site holds back what is about fewer than `min_count` records; the server refuses a site that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fl.errors import JobFailed, RecipeUnusable
from fl.jobs.progress import JobEvent
from fl.jobs.settings import FedStatsOptions, JobSettings
from fl.local.statistics import below_floor
from fl.model import tensors_of
from fl.recipes.recipe import TrainingRecipe
from fl.server.federation import Federation, Task
from fl.tensors import encode
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored

SUMS: Final = ("count", "sum", "squares", "histogram")


class FedStatsRecipe(TrainingRecipe):
    """Counts, means, variances and histograms over all sites."""

    def __init__(
        self,
        *,
        name: str = "statistics",
        features: Mapping[str, tuple[float, float]],
        bins: int = 10,
        min_count: int = 10,
        min_clients: int,
        train_script: str,
        train_args: str | Sequence[str] = "",
        round_seconds: int = 3600,
    ) -> None:
        """Arguments; the others are FedAvgRecipe's:

        - `features`: each feature's name, and the range of its histogram; the script's columns in this order.
        - `bins`: how many bins of equal width a histogram has, at most 1000.
        - `min_count`: nothing about fewer records of a site leaves it.

        Raises RecipeUnusable with the argument that is wrong.
        """
        if not 1 <= bins <= 1000:
            raise RecipeUnusable(f"bins is {bins}, not 1 to 1000", where="bins")
        for feature, (low, high) in features.items():
            if not (np.isfinite([low, high]).all() and low < high):
                raise RecipeUnusable(f"the range of {feature!r} is {low} to {high}", where="features")
        each = np.zeros(len(features))
        model = {
            **dict.fromkeys(("count", "sum", "squares", "mean"), each),
            "histogram": np.zeros((len(features), bins)),
            "edges": np.array([np.linspace(low, high, bins + 1) for low, high in features.values()]),
        }
        super().__init__(
            "fedstats",
            {"features": tuple(features), "min_count": min_count},
            {
                "name": name,
                "initial_model": model,
                "min_clients": min_clients,
                "num_rounds": 2,
                "train_script": train_script,
                "train_args": train_args,
                "round_seconds": round_seconds,
            },
        )


def statistics(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run both rounds over `sites` from `model`, which is closed; the statistics, the caller's to close.

    They are tensors `FEATURE/count`, `FEATURE/mean`, `FEATURE/variance`, `FEATURE/histogram`, `FEATURE/edges`; without
    mean and variance where fewer than two values count. Raises JobFailed and JobAborted as `Federation.train` does.
    """
    options = settings.options
    if not isinstance(options, FedStatsOptions):
        raise ValueError("the settings are not those of federated statistics")
    edges = model.tensors().array("edges").copy()
    mean = np.zeros(len(edges))
    sums: dict[str, npt.NDArray[Any]] = {}
    for round_ in range(settings.num_rounds):
        about = mean
        sums = {name: np.zeros(sites.schema[name].shape) for name in SUMS}
        counted = 0
        for update in sites.train(Task(round_, settings.num_rounds, model)):
            reason = below_floor(update.tensors, options.min_count)
            if reason is None:
                for name, total in sums.items():
                    total += update.tensors.array(name)
                counted += 1
            else:
                sites.lose(update.site, reason, kind="refused")
            update.close()
        if counted < settings.min_clients:
            lost = tuple(f"{name}: {reason}" for name, reason in sorted(sites.lost.items()))
            fact = f"round {round_} has {counted} updates that count, {settings.min_clients} are needed"
            raise JobFailed(sites.job, (fact, *lost))
        mean = sums["sum"] / np.maximum(sums["count"], 1)
        model.close()
        zeros = {name: np.zeros(sites.schema[name].shape) for name in SUMS}
        model = SealedMemory.of(encode(tensors_of({**zeros, "mean": mean, "edges": edges})))
        sites.observe(JobEvent(kind="aggregated", round=round_))
    model.close()
    count = sums["count"]
    variance = (sums["squares"] - count * np.square(mean - about)) / np.maximum(count - 1, 1)
    found: dict[str, Any] = {}
    for at, feature in enumerate(options.features):
        found[f"{feature}/count"] = count[at]
        found[f"{feature}/histogram"] = sums["histogram"][at]
        found[f"{feature}/edges"] = edges[at]
        if count[at] >= 2:
            found[f"{feature}/mean"] = mean[at]
            found[f"{feature}/variance"] = np.maximum(variance[at], 0.0)
    return SealedMemory.of(encode(tensors_of(found)))
