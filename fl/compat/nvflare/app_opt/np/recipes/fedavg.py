"""Federated averaging of arrays."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import FedAvgRecipe

NumpyFedAvgRecipe = FedAvgRecipe

__all__ = ["FedAvgRecipe", "NumpyFedAvgRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
