"""NumPy recipes."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import FedAvgRecipe, NumpyCrossSiteEvalRecipe

NumpyFedAvgRecipe = FedAvgRecipe

__all__ = ["FedAvgRecipe", "NumpyCrossSiteEvalRecipe", "NumpyFedAvgRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
