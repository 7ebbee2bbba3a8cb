"""Which algorithm runs a recipe's job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from fl.jobs.settings import JobSettings
from fl.recipes.cyclic import cyclic
from fl.recipes.fedavg import fedavg
from fl.recipes.fedopt import fedopt
from fl.recipes.fedprox import fedprox
from fl.recipes.newton import newton
from fl.recipes.scaffold import scaffold
from fl.recipes.statistics import statistics
from fl.server.federation import Federation
from fl.transport.memory import SealedMemory

Workflow: TypeAlias = Callable[[Federation, JobSettings, SealedMemory], SealedMemory]

WORKFLOWS: Final[Mapping[str, Workflow]] = {
    "cyclic": cyclic,
    "fedavg": fedavg,
    "fedopt": fedopt,
    "fedprox": fedprox,
    "fedstats": statistics,
    "lr-newton": newton,
    "scaffold": scaffold,
}
