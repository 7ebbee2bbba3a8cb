"""Which algorithm runs a recipe's job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from fl.jobs.settings import JobSettings
from fl.recipes.fedavg import fedavg
from fl.server.federation import Federation
from fl.transport.memory import SealedMemory

Workflow: TypeAlias = Callable[[Federation, JobSettings, SealedMemory], SealedMemory]

WORKFLOWS: Final[Mapping[str, Workflow]] = {"fedavg": fedavg}
