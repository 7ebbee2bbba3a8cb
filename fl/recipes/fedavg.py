"""FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".

Each round, every site trains the global model on its own data, and the server takes the mean of what they send,
weighted by the number of steps that each says it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Unpack

from fl.jobs.settings import JobSettings
from fl.model import MAX_METRICS
from fl.recipes.masked import masked_fedavg
from fl.recipes.recipe import TrainingArguments, TrainingRecipe
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.transport.stored import Stored


class FedAvgRecipe(TrainingRecipe):
    """Train one model over all sites by federated averaging."""

    def __init__(self, **training: Unpack[TrainingArguments]) -> None:
        """Arguments, which the other recipes of training share (docs/reference/recipes.md has each):

        - `name`: the job's name: lower-case letters, digits, `.`, `_`, `-`.
        - `initial_model` or `model` (one of them): a torch module, `{"class_path", "args"}` for one, or arrays by name.
        - `initial_ckpt`: a file, `.safetensors` or `.npy`, whose numbers the first model has.
        - `min_clients`: a round needs at least so many updates; with fewer the job fails.
        - `num_rounds`: how many rounds.
        - `train_script`: the training script, relative to the folder of the file that makes the recipe.
        - `train_args`: its command line.
        - `per_site_config`: what a site does otherwise: `{"site-1": {"train_script": ..., "train_args": ...}}`.
        - `params_type`: whether updates travel as whole parameters or as differences from what was received.
        - `delta`: "bf16" or "int8": differences travel in two bytes or one for a number, with error feedback
          (`fl.aggregation.deltas`); `params_type` is "DIFF" then.
        - `round_seconds`: a site that takes longer for a round is out of the job.
        - `key_metric`, `key_metric_mode`: the metric by which the best model is kept, and its best: "max" or "min".
        - `stop_cond`: the job ends when the metric reaches this, as "accuracy >= 0.9".
        - `patience`: the job ends after so many rounds without a better metric.
        - `secure_aggregation`: True, and the server sees sums alone (docs/explanation/secure-aggregation.md).
        - `robust`: `{"rule": "krum", "byzantine": 1}`, `{"rule": "trimmed-mean", "trim": 0.2}` or `{"rule":
          "norm-clipping"}`: a rule that some bad updates cannot move far (`fl.aggregation.robust`).
        - `watermark`: True, or `{"strength": 0.01}`: each site's model names the site (docs/how-to/trace-a-leak.md).
        - `aggregator`: a script that folds updates in the mean's place (`fl.aggregation.custom`).

        Raises RecipeUnusable with the argument that is wrong.
        """
        super().__init__("fedavg", None, training)


def fedavg(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run the rounds over `sites` from `model`, which is closed; the last global model, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does.
    """
    if settings.secure_aggregation is not None:
        return masked_fedavg(sites, settings, settings.secure_aggregation, sites.notary, model)
    rounds = Rounds(sites, settings, model)
    model = rounds.model
    with closing(sites.aggregation()) as mean:
        for round_ in rounds:
            metrics = MeanOfMetrics()
            for update in sites.train(Task(round_, settings.num_rounds, model)):
                mean.fold(update.tensors, update.weight, update.site, update.memory)
                metrics.add(update.metrics, update.weight)
                update.close()
            following = mean.result(model.tensors())
            rounds.end(round_, metrics.result(), received=model, following=following)
            model.close()
            model = following
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
