"""Evaluation across sites: how good a model is on the data of each, which stay where they are.

`FedEvalRecipe` has every site evaluate one model. `add_cross_site_evaluation` adds to a job of training that afterwards
every site hands over the model that it trained itself last, and every site evaluates all of them and the global one:
the matrix that shows whose data a model does not fit. Sites' own models then reach other sites' sandboxes, which
whoever approves the bundle decides. They lie in the server's memory meanwhile, all of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final, Unpack

from fl.errors import RecipeUnusable
from fl.jobs.progress import JobEvent
from fl.jobs.settings import JobSettings
from fl.recipes.fedavg import MeanOfMetrics
from fl.recipes.recipe import Recipe, TrainingArguments, TrainingRecipe
from fl.server.federation import Federation, Task
from fl.transport.stored import Stored

GLOBAL: Final = "global"
"""The name of the job's own model among the evaluated ones; a site's own model has the site's name."""
BEST: Final = "global-best"


class FedEvalRecipe(TrainingRecipe):
    """Evaluate one model at every site."""

    def __init__(self, **training: Unpack[TrainingArguments]) -> None:
        """Arguments are FedAvgRecipe's, but for those about rounds: there is one.

        The script answers each model with metrics; `flare.is_evaluate()` is true. Raises RecipeUnusable.
        """
        for name in (
            "num_rounds",
            "params_type",
            "key_metric",
            "key_metric_mode",
            "stop_cond",
            "patience",
            "aggregator",
        ):
            if name in training:
                raise RecipeUnusable("an evaluation has no such argument", where=name)
        training.setdefault("name", "fedeval")
        super().__init__("fedeval", {}, {**training, "num_rounds": 1})


def add_cross_site_evaluation(recipe: Recipe) -> None:
    """Have every site evaluate the global model and every site's own after the rounds of `recipe`.

    Raises RecipeUnusable for recipes whose sites train no model.
    """
    if recipe.settings.recipe in {"fedstats", "lr-newton", "scaffold"}:
        raise RecipeUnusable(f"{recipe.settings.recipe} has no model that sites could evaluate", where="recipe")
    recipe.change(cross_site_evaluation=True)


def fedeval(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Have the sites evaluate `model`, which is closed; the same model, the caller's to close.

    Raises JobFailed and JobAborted as `Federation.train` does.
    """
    metrics = MeanOfMetrics()
    with model:
        for update in sites.train(Task(0, settings.num_rounds, model, "evaluate")):
            sites.observe(JobEvent(kind="evaluated", site=update.site, text=GLOBAL, values=dict(update.metrics)))
            metrics.add(update.metrics, update.weight)
            update.close()
        sites.observe(JobEvent(kind="aggregated", round=0, values=metrics.result()))
        return model.share()


def evaluate_across_sites(sites: Federation, settings: JobSettings, model: Stored) -> None:
    """Collect the sites' own models; have every site evaluate those and `model`, and the best if there is another.

    A site that fails is out of what follows; the job's result does not suffer. Raises JobAborted.
    """
    total = settings.num_rounds
    with ExitStack() as held:
        models = {} if settings.recipe == "fedeval" else {GLOBAL: model}
        if sites.best is not None:
            models[BEST] = sites.best
        for update in sites.train(Task(total, total, model, "submit_model")):
            held.callback(update.close)
            models[update.site] = update.memory
        for number, (name, evaluated) in enumerate(models.items(), total + 1):
            for update in sites.train(Task(number, total, evaluated, "evaluate")):
                sites.observe(JobEvent(kind="evaluated", site=update.site, text=name, values=dict(update.metrics)))
                update.close()
