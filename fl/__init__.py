"""Federated learning: recipes that run anywhere, a client API, environments, and the server and sites that run jobs.

Importing this package is light; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fl.environments.prod import ProdEnv
    from fl.environments.sim import SimEnv
    from fl.recipes.fedavg import FedAvgRecipe
    from fl.tracking import add_experiment_tracking

__all__ = ["FedAvgRecipe", "ProdEnv", "SimEnv", "add_experiment_tracking"]

_HOMES: Final = {
    "FedAvgRecipe": "fl.recipes.fedavg",
    "ProdEnv": "fl.environments.prod",
    "SimEnv": "fl.environments.sim",
    "add_experiment_tracking": "fl.tracking",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fl' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
