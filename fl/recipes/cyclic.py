"""Cyclic weight transfer.

Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging". There is no mean: in
each round the model travels from site to site, each trains it on its own data and hands it on. A site that fails at its
turn is left out, and the model goes on as the site before it left it.
"""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import JobFailed
from fl.jobs.settings import CyclicOptions, JobSettings
from fl.recipes.fedavg import MeanOfMetrics
from fl.recipes.recipe import TrainingArguments, TrainingRecipe
from fl.recipes.rounds import Rounds
from fl.server.federation import Federation, Task
from fl.transport.stored import Stored


class CyclicRecipe(TrainingRecipe):
    """Train one model at one site after the other."""

    def __init__(
        self, *, order: Literal["fixed", "random"] = "fixed", seed: int = 0, **training: Unpack[TrainingArguments]
    ) -> None:
        """Arguments; the others are FedAvgRecipe's:

        - `order`: "fixed" (the sites by name) or "random" (drawn anew for each round, from `seed`).

        Raises RecipeUnusable with the argument that is wrong.
        """
        super().__init__("cyclic", {"order": order, "seed": seed}, training)


def cyclic(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run the rounds over `sites` from `model`, which is closed; the last site's model, the caller's to close.

    Raises JobFailed with fewer than `min_clients` updates in a round, JobAborted as `Federation.train` does.
    """
    options = settings.options
    if not isinstance(options, CyclicOptions):
        raise ValueError("the settings are not those of cyclic weight transfer")
    mean = WeightedMean(sites.schema, sites.params_type)  # of one: it turns an update, FULL or DIFF, into a model
    rounds = Rounds(sites, settings, model)
    model = rounds.model
    for round_ in rounds:
        order = list(sites.sites)
        if options.order == "random":
            np.random.default_rng([options.seed, round_]).shuffle(order)
        received = model.share()
        metrics = MeanOfMetrics()
        updates = 0
        for site in order:
            for update in sites.train(Task(round_, settings.num_rounds, model), only=site):
                mean.fold(update.tensors, 1.0)
                metrics.add(update.metrics, update.weight)
                update.close()
                following = mean.result(model.tensors())
                model.close()
                model = following
                updates += 1
        if updates < settings.min_clients:
            lost = tuple(f"{name}: {reason}" for name, reason in sorted(sites.lost.items()))
            fact = f"round {round_} has {updates} updates, {settings.min_clients} are needed"
            raise JobFailed(sites.job, (fact, *lost))
        with received:
            rounds.end(round_, metrics.result(), received=received, following=model)
    return model
