"""The weighted mean of updates, one at a time: FederatedAveraging's server step (McMahan et al. 2017, Algorithm 1).

w_{t+1} = sum_k (n_k / n) w^k_{t+1}, with n_k the weight of site k's update and n their sum. Only the running sum is
kept, in float32 for floats of up to 32 bits and in float64 else, so that memory does not grow with the number of sites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fl.model import ParamsType
from fl.tensors import BLOCK, FLOATS, NUMPY_DTYPE, Schema, TensorFile, layout, narrow_bf16, widen_bf16
from fl.transport.memory import NamedDraft, SealedMemory

Block: TypeAlias = npt.NDArray[Any]
ServerStep: TypeAlias = Callable[[str, int, Block, Block], Block]
"""A server's own step for one block of a tensor of floats: tensor, index of the block's first element, the block of the
current model, the mean difference of the updates from it; the block of the next model. float32 or float64."""


class WeightedMean:
    """A running weighted mean over updates of one schema; `result` ends one and the next `fold` begins another.

    Updates are folded only whole and only after `fl.guard.gate.admit_update`; all have the same `params_type`. With two
    updates the result does not depend on their order; with more, only in the last bits of rounding.
    """

    def __init__(self, schema: Schema, params_type: ParamsType) -> None:
        self._schema = schema
        self._params_type = params_type
        self._total = 0.0
        self._sums: dict[str, npt.NDArray[Any]] = {
            name: np.empty(spec.elements, dtype=np.float32 if spec.dtype in {"F32", "F16", "BF16"} else np.float64)
            for name, spec in schema.items()
        }
        self.count = 0
        """How many updates were folded."""

    def fold(self, update: TensorFile, weight: float, site: str = "") -> None:
        """Add an admitted update with `weight` > 0; a mean does not ask of which site."""
        for name, total in self._sums.items():
            factor = total.dtype.type(weight)
            scratch = np.empty(min(BLOCK, total.size), dtype=total.dtype)
            for start, block in update.blocks(name):
                part = total[start : start + block.size]
                if not self.count:
                    np.multiply(block, factor, out=part, dtype=total.dtype, casting="same_kind")
                    continue
                scaled = scratch[: block.size]
                np.multiply(block, factor, out=scaled, dtype=total.dtype, casting="same_kind")
                part += scaled
        self._total += weight
        self.count += 1

    def close(self) -> None:
        """Give the sums back."""
        self._sums.clear()

    def result(self, model: TensorFile, step: ServerStep | None = None) -> SealedMemory:
        """The next global model: the mean itself, or `model` plus the mean of differences; floats by `step` if given.

        Integers are rounded to the nearest; booleans are true where the mean is at least one half.
        """
        if not self.count:
            raise ValueError("no update was folded")
        header, offsets, size = layout(self._schema)
        with NamedDraft(size) as draft:
            draft.append(header)
            for name in sorted(self._schema, key=lambda name: offsets[name]):
                spec = self._schema[name]
                total = self._sums[name]
                for start in range(0, spec.elements, BLOCK):
                    end = min(start + BLOCK, spec.elements)
                    mean = total[start:end] / total.dtype.type(self._total)
                    if step is not None and spec.dtype in FLOATS:
                        current = _block(model, name, start, end).astype(total.dtype, copy=False)
                        difference = mean if self._params_type is ParamsType.DIFF else mean - current
                        mean = step(name, start, current, difference)
                    elif self._params_type is ParamsType.DIFF:
                        mean += _block(model, name, start, end).astype(total.dtype, copy=False)
                    draft.append(as_dtype(mean, spec.dtype).view(np.uint8).data)
            self._total, self.count = 0.0, 0
            return draft.seal()


def _block(model: TensorFile, name: str, start: int, end: int) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = model.array(name).reshape(-1)[start:end]
    return widen_bf16(flat) if model.schema[name].dtype == "BF16" else flat


def as_dtype(mean: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Numbers in the form of safetensors' `dtype`: integers rounded, booleans true from one half on."""
    found: npt.NDArray[Any]
    if dtype == "BF16":
        found = narrow_bf16(mean)
    elif dtype == "BOOL":
        found = mean >= 0.5
    elif dtype in FLOATS:
        found = mean.astype(NUMPY_DTYPE[dtype], copy=False)
    else:
        bounds = np.iinfo(np.dtype(NUMPY_DTYPE[dtype]))
        found = np.clip(np.rint(mean), bounds.min, bounds.max).astype(NUMPY_DTYPE[dtype])
    return found
