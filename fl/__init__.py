"""Federated learning: recipes that run anywhere, a client API, environments, and the server and sites that run jobs.

Importing this package is light; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fl.edge.device_model import DeviceModel
    from fl.edge.masks import DeviceMasking
    from fl.edge.recipes import EdgeFedBuffRecipe, ETFedBuffRecipe, SimulationConfig
    from fl.edge.settings import DeviceManagerConfig, DevicePrivacy, EvaluatorConfig, ModelManagerConfig
    from fl.environments.poc import PocEnv
    from fl.environments.prod import ProdEnv
    from fl.environments.sim import SimEnv
    from fl.recipes.cyclic import CyclicRecipe
    from fl.recipes.declaring import declare_outputs, train_privately
    from fl.recipes.evaluation import FedEvalRecipe, add_cross_site_evaluation
    from fl.recipes.fedavg import FedAvgRecipe
    from fl.recipes.fedopt import FedOptRecipe
    from fl.recipes.fedprox import FedProxRecipe
    from fl.recipes.newton import FedAvgLrRecipe
    from fl.recipes.scaffold import ScaffoldRecipe
    from fl.recipes.statistics import FedStatsRecipe
    from fl.tracking import add_experiment_tracking

__all__ = [
    "CyclicRecipe",
    "DeviceManagerConfig",
    "DeviceMasking",
    "DeviceModel",
    "DevicePrivacy",
    "ETFedBuffRecipe",
    "EdgeFedBuffRecipe",
    "EvaluatorConfig",
    "FedAvgLrRecipe",
    "FedAvgRecipe",
    "FedEvalRecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "FedStatsRecipe",
    "ModelManagerConfig",
    "PocEnv",
    "ProdEnv",
    "ScaffoldRecipe",
    "SimEnv",
    "SimulationConfig",
    "add_cross_site_evaluation",
    "add_experiment_tracking",
    "declare_outputs",
    "train_privately",
]

_HOMES: Final = {
    "CyclicRecipe": "fl.recipes.cyclic",
    "DeviceManagerConfig": "fl.edge.settings",
    "DeviceModel": "fl.edge.device_model",
    "DeviceMasking": "fl.edge.masks",
    "DevicePrivacy": "fl.edge.settings",
    "ETFedBuffRecipe": "fl.edge.recipes",
    "EdgeFedBuffRecipe": "fl.edge.recipes",
    "EvaluatorConfig": "fl.edge.settings",
    "FedAvgLrRecipe": "fl.recipes.newton",
    "FedAvgRecipe": "fl.recipes.fedavg",
    "FedEvalRecipe": "fl.recipes.evaluation",
    "FedOptRecipe": "fl.recipes.fedopt",
    "FedProxRecipe": "fl.recipes.fedprox",
    "FedStatsRecipe": "fl.recipes.statistics",
    "ModelManagerConfig": "fl.edge.settings",
    "PocEnv": "fl.environments.poc",
    "ProdEnv": "fl.environments.prod",
    "ScaffoldRecipe": "fl.recipes.scaffold",
    "SimEnv": "fl.environments.sim",
    "SimulationConfig": "fl.edge.recipes",
    "add_cross_site_evaluation": "fl.recipes.evaluation",
    "add_experiment_tracking": "fl.tracking",
    "declare_outputs": "fl.recipes.declaring",
    "train_privately": "fl.recipes.declaring",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fl' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
