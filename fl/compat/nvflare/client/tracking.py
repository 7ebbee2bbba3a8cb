"""Writers that log through the job: what a script writes is tracked where the job is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl import client
from fl.compat import missing

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class SummaryWriter:
    """TensorBoard's calls."""

    def __init__(self, ctx: object = None) -> None:
        """Nothing is opened here: the values go to the job."""

    def add_scalar(self, tag: str, scalar: Any, global_step: int | None = None, **more: Any) -> None:
        """Log one number."""
        client.log(tag, scalar, global_step or 0)

    def add_scalars(self, tag: str, scalars: Mapping[str, Any], global_step: int | None = None, **more: Any) -> None:
        """Log several numbers, as `TAG/NAME`."""
        for name, scalar in scalars.items():
            client.log(f"{tag}/{name}", scalar, global_step or 0)

    def flush(self) -> None:
        """Values have gone already."""


class MLflowWriter:
    """MLflow's calls for numbers."""

    def __init__(self, ctx: object = None) -> None:
        """Nothing is opened here: the values go to the job."""

    def log_metric(self, key: str, value: Any, step: int | None = None) -> None:
        """Log one number."""
        client.log(key, value, step or 0)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several numbers."""
        for key, value in metrics.items():
            client.log(key, value, step or 0)

    def __getattr__(self, name: str) -> object:
        missing(__name__, f"MLflowWriter.{name}")


class WandBWriter:
    """Weights & Biases' call for numbers."""

    def __init__(self, ctx: object = None) -> None:
        """Nothing is opened here: the values go to the job."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log several numbers."""
        for key, value in metrics.items():
            client.log(key, value, step or 0)


def __getattr__(name: str) -> object:
    missing(__name__, name)
