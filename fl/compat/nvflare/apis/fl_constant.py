"""Names of entries in a model's `meta`."""

from __future__ import annotations

from fl.compat import missing
from fl.model import WEIGHT_KEY as _WEIGHT_KEY


class _Names(type):
    def __getattr__(cls, name: str) -> object:
        missing(__name__, f"{cls.__name__}.{name}")


class FLMetaKey(metaclass=_Names):
    """`NUM_STEPS_CURRENT_ROUND` is an update's weight."""

    NUM_STEPS_CURRENT_ROUND = _WEIGHT_KEY


def __getattr__(name: str) -> object:
    missing(__name__, name)
