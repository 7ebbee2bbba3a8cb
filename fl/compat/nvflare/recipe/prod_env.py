"""One environment."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.environments import ProdEnv

__all__ = ["ProdEnv"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
