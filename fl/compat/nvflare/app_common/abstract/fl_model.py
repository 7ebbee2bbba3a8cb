"""What passes between script and job."""

from __future__ import annotations

from fl.compat import missing
from fl.model import FLModel, ParamsType

__all__ = ["FLModel", "ParamsType"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
