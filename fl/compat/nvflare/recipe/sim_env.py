"""One environment."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.environments import SimEnv

__all__ = ["SimEnv"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
