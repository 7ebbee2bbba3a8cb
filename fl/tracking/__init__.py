"""Where a job's metrics go: TensorBoard's files or MLflow's, beside its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from fl.errors import RecipeUnusable
from fl.jobs.progress import JobEvent
from fl.jobs.settings import JobSettings, Tracking

if TYPE_CHECKING:
    from fl.recipes.recipe import Recipe


class Tracker(Protocol):
    """Takes a job's events."""

    def observe(self, event: JobEvent) -> None:
        """Take one event into account."""

    def close(self) -> None:
        """Write what is left and end."""


def add_experiment_tracking(recipe: Recipe, tracking_type: str) -> None:
    """Have the recipe's job tracked. Raises RecipeUnusable.

    `tracking_type` is "tensorboard": event files in the result's `events` folder; or "mlflow": a run in its `mlruns`.
    """
    known = get_args(Tracking)
    if tracking_type not in known:
        do = " or ".join(f'"{name}"' for name in known)
        raise RecipeUnusable(f"tracking_type {tracking_type!r} is not known", where="tracking_type", do=f"Use {do}.")
    recipe.change(tracking=tracking_type)


def start_tracking(settings: JobSettings, folder: Path) -> Tracker | None:
    """What `settings` ask for as the job runs, writing into `folder`. Raises RecipeUnusable without its library."""
    if settings.tracking == "tensorboard":
        from fl.tracking.tensorboard import TensorBoardTracking

        return TensorBoardTracking(folder / "events")
    if settings.tracking == "mlflow":
        from fl.tracking.mlflow import require_mlflow

        require_mlflow()
    return None


def track_result(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what is written of a finished job's record (job.json) beside its result. Raises RecipeUnusable."""
    if record.get("tracking") == "mlflow":
        from fl.tracking.mlflow import write_mlflow

        write_mlflow(folder / "mlruns", record)
