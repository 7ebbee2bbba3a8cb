"""Names of NumPy models."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.names import NUMPY_KEY as _KEY


class NPConstants:
    """`NUMPY_KEY` is the name of a model's one array."""

    NUMPY_KEY = _KEY


def __getattr__(name: str) -> object:
    missing(__name__, name)
