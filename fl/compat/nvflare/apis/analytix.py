"""Kinds of logged values."""

from __future__ import annotations

from enum import Enum

from fl.compat import missing


class AnalyticsDataType(Enum):
    """What a script logs: numbers."""

    SCALAR = "SCALAR"
    METRIC = "METRIC"


def __getattr__(name: str) -> object:
    missing(__name__, name)
