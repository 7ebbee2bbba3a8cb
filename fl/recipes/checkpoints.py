"""A recipe's first numbers from a file: safetensors, or one NumPy array."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl.errors import MalformedTensors, RecipeUnusable
from fl.model import params_of
from fl.tensors import Buffer, TensorSpec, parse


def load_checkpoint(folder: Path, path: str | Path) -> dict[str, Any]:
    """The arrays of a checkpoint by name; an `.npy` file is one array, `numpy_key`. Raises RecipeUnusable.

    Safetensors and NumPy's arrays alone: a `.pt` file is a pickle, which may hold code.
    """
    file = Path(path) if Path(path).is_absolute() else folder / path
    where = "initial_ckpt"
    if not file.is_file():
        raise RecipeUnusable(f"there is no file {path}", where=where)
    if file.suffix == ".npy":
        try:
            return {"numpy_key": np.load(file, allow_pickle=False)}
        except (OSError, ValueError) as error:
            raise RecipeUnusable(f"{file.name} is no array: {error}", where=where) from error
    if file.suffix != ".safetensors":
        raise RecipeUnusable(
            f"{file.name} is neither .safetensors nor .npy",
            where=where,
            do="Convert it once: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE).",
        )
    raw = file.read_bytes()
    try:
        return params_of(parse(raw, max_size=len(raw), where=file.name), "numpy")
    except MalformedTensors as error:
        raise RecipeUnusable(error.what, where=where) from error


def with_numbers(
    tensors: Mapping[str, tuple[TensorSpec, Buffer]], loaded: Mapping[str, tuple[TensorSpec, Buffer]]
) -> dict[str, tuple[TensorSpec, Buffer]]:
    """A model's tensors with the numbers of a checkpoint. Raises RecipeUnusable unless they are the same tensors."""
    different = [name for name in {**tensors, **loaded} if name not in tensors or name not in loaded]
    different += [name for name in tensors if name in loaded and tensors[name][0] != loaded[name][0]]
    if different:
        raise RecipeUnusable(f"tensor {different[0]!r} is not as in the model", where="initial_ckpt")
    return {name: loaded[name] for name in tensors}
