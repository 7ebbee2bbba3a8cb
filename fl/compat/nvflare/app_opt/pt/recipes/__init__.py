"""PyTorch recipes."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import (
    CyclicRecipe,
    FedAvgRecipe,
    FedEvalRecipe,
    FedOptRecipe,
    FedProxRecipe,
    ScaffoldRecipe,
)

__all__ = ["CyclicRecipe", "FedAvgRecipe", "FedEvalRecipe", "FedOptRecipe", "FedProxRecipe", "ScaffoldRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
