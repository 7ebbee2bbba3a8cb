"""Words for how models travel: whole or as differences; formats of exchange are all one here."""

from __future__ import annotations

from enum import StrEnum

from fl.compat import missing


class TransferType(StrEnum):
    """Whether scripts send parameters or differences."""

    FULL = "FULL"
    DIFF = "DIFF"


class ExchangeFormat(StrEnum):
    """Without effect: models are safetensors, and a script gets what its recipe's model is made of."""

    RAW = "raw"
    NUMPY = "numpy"
    PYTORCH = "pytorch"


def __getattr__(name: str) -> object:
    missing(__name__, name)
