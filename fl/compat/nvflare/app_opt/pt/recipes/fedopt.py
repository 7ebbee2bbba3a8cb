"""A PyTorch recipe."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.training import FedOptRecipe

__all__ = ["FedOptRecipe"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
