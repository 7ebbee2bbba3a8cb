"""FLModel: what passes between a training script and its job, and its tensors to and from arrays of a framework."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from fl.errors import MalformedTensors, RecipeUnusable
from fl.tensors import NUMPY_DTYPE, Buffer, Schema, TensorFile, TensorSpec

if TYPE_CHECKING:
    import torch

Framework: TypeAlias = Literal["numpy", "pytorch"]
Scalar: TypeAlias = bool | int | float | str

MAX_METRICS: Final = 64
MAX_WEIGHT: Final = float(1 << 31)
WEIGHT_KEY: Final = "NUM_STEPS_CURRENT_ROUND"
"""The entry of `meta` by which a site's update is weighted in the mean; 1 if it is absent."""


class ParamsType(StrEnum):
    """Whether parameters are the model itself or the difference from the model that was received."""

    FULL = "FULL"
    DIFF = "DIFF"


@dataclass(slots=True)
class FLModel:
    """A model or an update.

    `params` maps names to arrays or tensors, `metrics` names to finite numbers. `meta` holds small scalars, of which
    `NUM_STEPS_CURRENT_ROUND` is the weight of an update. The fields about rounds are set by the job.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    params_type: ParamsType | str = ParamsType.FULL
    metrics: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, Scalar] = field(default_factory=dict)
    current_round: int | None = None
    total_rounds: int | None = None


def check_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as floats. Raises MalformedTensors if they are too many, badly named or not finite."""
    if len(metrics) > MAX_METRICS:
        raise MalformedTensors(f"there are {len(metrics)} metrics, more than {MAX_METRICS}", where="metrics")
    checked: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not 0 < len(name) <= 128 or not name.isprintable():
            raise MalformedTensors("a metric's name is empty, too long or unprintable", where="metrics")
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise MalformedTensors(f"metric {name!r} is not a finite number", where="metrics")
        checked[name] = number
    return checked


def check_weight(meta: Mapping[str, Any]) -> float:
    """The weight that `meta` gives an update. Raises MalformedTensors unless 0 < weight <= MAX_WEIGHT."""
    weight = _number(meta.get(WEIGHT_KEY, 1.0))
    if weight is None or not 0 < weight <= MAX_WEIGHT:
        raise MalformedTensors(f"{WEIGHT_KEY} is not a number above 0 and at most {MAX_WEIGHT:.0f}", where="meta")
    return weight


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float | np.integer | np.floating):
        return float(value)
    item = getattr(value, "item", None)  # a tensor of one element
    if callable(item) and getattr(value, "ndim", None) == 0:
        return float(item())
    return None


def tensors_of(params: Mapping[str, Any], *, where: str = "params") -> dict[str, tuple[TensorSpec, Buffer]]:
    """Each parameter's spec and bytes; uncopied where it is already contiguous in memory.

    Accepts NumPy arrays, torch tensors and Python numbers. Raises RecipeUnusable for anything else.
    """
    tensors: dict[str, tuple[TensorSpec, Buffer]] = {}
    for name, value in params.items():
        if not isinstance(name, str):
            raise RecipeUnusable(f"a parameter's name is a {type(name).__name__}, not a string", where=where)
        if type(value).__module__.partition(".")[0] == "torch":
            tensors[name] = _torch_bytes(name, value, where)
            continue
        array = np.asarray(value)
        dtype = _NAMES.get(array.dtype.newbyteorder("<").str)
        if dtype is None:
            raise RecipeUnusable(f"parameter {name!r} has dtype {array.dtype}, which may not travel", where=where)
        contiguous = np.ascontiguousarray(array, dtype=NUMPY_DTYPE[dtype])
        tensors[name] = (
            TensorSpec(dtype, tuple(array.shape)),
            contiguous.reshape(-1).view(np.uint8).data,
        )
    return tensors


_NAMES: Final = {numpy: name for name, numpy in NUMPY_DTYPE.items() if name != "BF16"}
_TORCH_NAMES: Final = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip


def _torch_bytes(name: str, tensor: torch.Tensor, where: str) -> tuple[TensorSpec, Buffer]:
    import torch

    dtype = _TORCH_NAMES.get(str(tensor.dtype))
    if dtype is None or tensor.layout is not torch.strided:
        raise RecipeUnusable(
            f"parameter {name!r} is {tensor.dtype}, {tensor.layout}, which may not travel", where=where
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorSpec(dtype, tuple(tensor.shape)), flat.data


def params_of(file: TensorFile, framework: Framework) -> dict[str, Any]:
    """The file's tensors as NumPy arrays or torch tensors over the file's own bytes.

    BF16 has no NumPy dtype: with "numpy" it comes as float32.
    """
    if framework == "pytorch":
        return {name: _torch_tensor(file, name) for name in file.schema}
    from fl.tensors import widen_bf16

    return {
        name: widen_bf16(file.array(name)) if spec.dtype == "BF16" else file.array(name)
        for name, spec in file.schema.items()
    }


def _torch_tensor(file: TensorFile, name: str) -> torch.Tensor:
    import torch

    spec = file.schema[name]
    dtype = getattr(torch, _TORCH_TYPES[spec.dtype])
    if spec.elements == 0:
        return torch.empty(spec.shape, dtype=dtype)
    tensor: torch.Tensor = torch.frombuffer(file.bytes_of(name), dtype=dtype).reshape(spec.shape)
    return tensor


_TORCH_TYPES: Final = {
    **{name: torch_name.removeprefix("torch.") for torch_name, name in _TORCH_NAMES.items()},
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip


def schema_of(tensors: Mapping[str, tuple[TensorSpec, Buffer]]) -> Schema:
    """The specs of `tensors`, by name."""
    return {name: spec for name, (spec, _) in tensors.items()}
