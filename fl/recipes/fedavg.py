"""FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".

Each round, every site trains the global model on its own data, and the server takes the mean of what they send,
weighted by the number of steps that each says it took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import RecipeUnusable
from fl.jobs.progress import JobEvent
from fl.jobs.settings import JobSettings
from fl.model import MAX_METRICS
from fl.recipes.recipe import InitialModel, Recipe, find_script, make_settings
from fl.server.federation import Federation, Task
from fl.tensors import parse
from fl.transport.memory import SealedMemory


class FedAvgRecipe(Recipe):
    """Train one model over all sites by federated averaging."""

    def __init__(
        self,
        *,
        name: str = "fedavg",
        initial_model: InitialModel | None = None,
        model: InitialModel | None = None,
        min_clients: int,
        num_rounds: int = 2,
        train_script: str,
        train_args: str | Sequence[str] = "",
        params_type: Literal["FULL", "DIFF"] = "FULL",
        round_seconds: int = 3600,
    ) -> None:
        """Arguments:

        - `name`: the job's name: lower-case letters, digits, `.`, `_`, `-`.
        - `initial_model` or `model` (one of them): a torch module, `{"class_path", "args"}` for one, or arrays by name.
        - `min_clients`: a round needs at least so many updates; with fewer the job fails.
        - `num_rounds`: how many rounds.
        - `train_script`: the training script, relative to the folder of the file that makes the recipe.
        - `train_args`: its command line.
        - `params_type`: whether the script sends whole parameters or differences from what it received.
        - `round_seconds`: a site that takes longer for a round is out of the job.

        Raises RecipeUnusable with the argument that is wrong.
        """
        chosen = initial_model if initial_model is not None else model
        if chosen is None or (initial_model is not None and model is not None):
            raise RecipeUnusable("give exactly one of initial_model and model", where="initial_model")
        folder, script = find_script(train_script)
        settings, tensors = make_settings(
            recipe="fedavg",
            name=name,
            num_rounds=num_rounds,
            min_clients=min_clients,
            train_script=script,
            train_args=train_args,
            params_type=params_type,
            round_seconds=round_seconds,
            model=chosen,
            folder=folder,
        )
        super().__init__(settings, folder, tensors)


def fedavg(sites: Federation, settings: JobSettings, model: SealedMemory) -> SealedMemory:
    """Run the rounds over `sites` from `model`, which is closed; the last global model, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does.
    """
    mean = WeightedMean(sites.schema, sites.params_type)
    for round_ in range(settings.num_rounds):
        metrics = MeanOfMetrics()
        for update in sites.train(Task(round_, settings.num_rounds, model)):
            mean.fold(update.tensors, update.weight)
            metrics.add(update.metrics, update.weight)
            update.close()
        following = mean.result(parse(model.view, max_size=model.size))
        model.close()
        model = following
        sites.observe(JobEvent(kind="aggregated", round=round_, values=metrics.result()))
    return model


class MeanOfMetrics:
    """The weighted mean of each metric, over the updates that carry it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, float], weight: float) -> None:
        """Add one update's metrics."""
        for name, value in metrics.items():
            if name not in self._sums and len(self._sums) >= MAX_METRICS:
                continue  # sites that each make up names of their own cannot grow this without bound
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def result(self) -> dict[str, float]:
        """Each metric's mean."""
        return {name: total / weights for name, (total, weights) in sorted(self._sums.items())}
