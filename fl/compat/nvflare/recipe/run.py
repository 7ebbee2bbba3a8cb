"""A started job."""

from __future__ import annotations

from fl.compat import missing
from fl.run import Run

__all__ = ["Run"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
