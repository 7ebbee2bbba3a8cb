"""FLARE's recipe arguments in our words: taken over, without effect here, or refused by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fl.compat import NotSupported, bundled
from fl.compat.nvflare.names import NUMPY_KEY
from fl.recipes.recipe import Recipe

TAKEN: Final = frozenset(
    {
        "initial_ckpt", "min_clients", "num_rounds", "train_script", "train_args", "per_site_config", "key_metric",
        "key_metric_mode", "stop_cond", "patience",
    }
)  # fmt: skip
WITHOUT_EFFECT: Final = frozenset(
    {
        "aggregator_data_kind", "best_model_filename", "client_memory_gc_rounds", "command", "cuda_empty_cache",
        "device", "enable_tensor_disk_offload", "framework", "launch_external_process", "launch_once",
        "launch_timeout", "save_filename", "server_expected_format", "server_memory_gc_rounds", "shutdown_timeout",
        "source_model", "submit_model_timeout", "task_assignment_timeout", "validation_timeout",
    }
)  # fmt: skip
"""They tune what is otherwise here: a script always has a process of its own, models are always memory files, and
nothing has a time-out to tune."""


def ours(recipe: str, given: Mapping[str, Any], *, default: str) -> dict[str, Any]:
    """Our arguments. Raises NotSupported with the name of one that has no meaning here."""
    found: dict[str, Any] = {"name": job_name(given.get("name") or default)}
    for name, value in given.items():
        if name in {"model", "initial_model"}:
            if value is not None:
                found["initial_model"] = model_of(value)
        elif name == "params_transfer_type":
            found["params_type"] = "DIFF" if str(getattr(value, "value", value)).upper() == "DIFF" else "FULL"
        elif name in TAKEN:
            found[name] = None if name == "key_metric" and value == "" else value
        elif name not in WITHOUT_EFFECT | {"name"} and value is not None:
            raise NotSupported(f"nvflare {recipe}({name}=...)")
    return found


def job_name(name: str) -> str:
    """A name as jobs have it."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:60] or "job"


def model_of(model: Any) -> Any:
    """A model as our recipes take it: a list or an array is one parameter; a `path` is a `class_path`."""
    if isinstance(model, list | np.ndarray):
        return {NUMPY_KEY: np.asarray(model, dtype=np.float32 if isinstance(model, list) else None)}
    if isinstance(model, Mapping) and "path" in model:
        return {"class_path": model["path"], "args": model.get("args") or {}}
    weights = getattr(model, "get_weights", None)
    if callable(weights) and not hasattr(model, "state_dict"):
        return model_of(weights())
    return model


def adapt(recipe: Recipe) -> None:
    """Have the recipe's scripts find the stand-ins, and log as much as they may."""
    for script in recipe.settings.scripts:  # a script finds what lies in its own folder
        folder = script.rpartition("/")[0]
        recipe.added.update({f"{folder}/{path}".lstrip("/"): content for path, content in bundled("nvflare").items()})
    outputs = recipe.settings.outputs.model_dump()
    recipe.change(outputs={**outputs, "values": 10_000})
