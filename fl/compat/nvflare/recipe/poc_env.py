"""One environment."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.environments import PocEnv

__all__ = ["PocEnv"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
