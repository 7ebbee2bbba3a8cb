"""What a recipe's job may let out of a site, declared on the recipe as tracking is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fl.errors import RecipeUnusable
from fl.jobs.settings import JobSettings
from fl.recipes.recipe import Recipe


def declare_outputs(
    recipe: Recipe,
    *,
    metrics: Sequence[str] | None = None,
    values: int = 256,
    lines: Sequence[str] = (),
    line_bytes: int = 0,
    digits: int = 6,
    clip_norm: float | None = None,
    noise_multiplier: float = 0.0,
    bits: int | None = None,
    limit: float | None = None,
    release_seconds: int | None = None,
) -> None:
    """Declare the outputs of the recipe's job (`fl.jobs.outputs.Outputs` has each argument).

    Raises RecipeUnusable with the argument that is wrong.
    """
    outputs = {
        "metrics": None if metrics is None else tuple(metrics),
        "values": values,
        "lines": tuple(lines),
        "line_bytes": line_bytes,
        "digits": digits,
        "clip_norm": clip_norm,
        "noise_multiplier": noise_multiplier,
        "bits": bits,
        "limit": limit,
        "release_seconds": release_seconds,
    }
    recipe.settings = changed(recipe.settings, {"outputs": outputs})


def train_privately(recipe: Recipe, **privacy: Any) -> None:
    """Have the recipe's `train_script`, a graph (`fl.local.graph.export_graph`), trained by the sites' own loop.

    `privacy`: the fields of `fl.jobs.privacy.DpSgd`. Each record is protected with the epsilon and delta that
    `seal job review` tells. Raises RecipeUnusable with the argument that is wrong.
    """
    from fl.local.dp_sgd import what_runs

    outputs = {**recipe.settings.outputs.model_dump(), "metrics": (), "values": 0}
    settings = changed(recipe.settings, {"privacy": privacy, "outputs": outputs})
    what_runs(
        {settings.train_script: (recipe.folder / settings.train_script).read_bytes()}, settings, settings.train_script
    )
    recipe.settings = settings


def changed(settings: JobSettings, changes: dict[str, Any]) -> JobSettings:
    """Settings with some fields changed, checked as a whole. Raises RecipeUnusable with the field that is wrong."""
    try:
        return JobSettings.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "recipe"
        raise RecipeUnusable(f"{first['msg']} (got {first['input']!r:.80})", where=place) from error
