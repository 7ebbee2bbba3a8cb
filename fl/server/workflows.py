"""Which algorithm runs a recipe's job, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from fl.jobs.settings import JobSettings
from fl.recipes.cyclic import cyclic
from fl.recipes.evaluation import evaluate_across_sites, fedeval
from fl.recipes.fedavg import fedavg
from fl.recipes.fedopt import fedopt
from fl.recipes.fedprox import fedprox
from fl.recipes.newton import newton
from fl.recipes.scaffold import scaffold
from fl.recipes.statistics import statistics
from fl.server.federation import Federation
from fl.transport.stored import Stored

Workflow: TypeAlias = Callable[[Federation, JobSettings, Stored], Stored]

WORKFLOWS: Final[Mapping[str, Workflow]] = {
    "cyclic": cyclic,
    "fedavg": fedavg,
    "fedeval": fedeval,
    "fedopt": fedopt,
    "fedprox": fedprox,
    "fedstats": statistics,
    "lr-newton": newton,
    "scaffold": scaffold,
}


def run_workflow(sites: Federation, settings: JobSettings, model: Stored) -> Stored:
    """Run a job's algorithm from its first model, and the evaluation across sites if it has one; the last global model.

    Raises JobFailed, JobAborted.
    """
    result = WORKFLOWS[settings.recipe](sites, settings, model)
    if settings.cross_site_evaluation:
        try:
            evaluate_across_sites(sites, settings, result)
        except BaseException:
            result.close()
            raise
    return result
