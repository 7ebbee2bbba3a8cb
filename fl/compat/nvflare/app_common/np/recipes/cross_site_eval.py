"""Evaluation of arrays across sites."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import NumpyCrossSiteEvalRecipe

__all__ = ["NumpyCrossSiteEvalRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
