"""Logistic regression by Newton's method."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import FedAvgLrRecipe

__all__ = ["FedAvgLrRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
