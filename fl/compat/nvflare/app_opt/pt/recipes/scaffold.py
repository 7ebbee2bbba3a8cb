"""A PyTorch recipe."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import ScaffoldRecipe

__all__ = ["ScaffoldRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
