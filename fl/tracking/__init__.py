"""Where a job's metrics go: TensorBoard, at the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl.errors import RecipeUnusable

if TYPE_CHECKING:
    from fl.recipes.recipe import Recipe


def add_experiment_tracking(recipe: Recipe, tracking_type: str) -> None:
    """Have the recipe's job tracked. `tracking_type` is "tensorboard": event files in the result's `events` folder."""
    if tracking_type != "tensorboard":
        raise RecipeUnusable(
            f"tracking_type {tracking_type!r} is not known", where="tracking_type", do='Use "tensorboard".'
        )
    recipe.settings = recipe.settings.model_copy(update={"tracking": "tensorboard"})
