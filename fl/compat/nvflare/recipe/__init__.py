"""Environments and helpers of recipes."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.environments import (
    PocEnv,
    ProdEnv,
    SimEnv,
    add_cross_site_evaluation,
    add_experiment_tracking,
    set_per_site_config,
)
from fl.compat.nvflare.training import FedAvgRecipe
from fl.run import Run

__all__ = [
    "FedAvgRecipe",
    "PocEnv",
    "ProdEnv",
    "Run",
    "SimEnv",
    "add_cross_site_evaluation",
    "add_experiment_tracking",
    "set_per_site_config",
]


def __getattr__(name: str) -> object:
    missing(__name__, name)
