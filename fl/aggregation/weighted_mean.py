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
from fl.tensors import BLOCK, FLOATS, NUMPY_DTYPE, Schema, TensorFile, TensorSpec, layout, narrow_bf16
from fl.transport.drafts import ModelDraft
from fl.transport.spool import Spool
from fl.transport.stored import Stored

Block: TypeAlias = npt.NDArray[Any]
ServerStep: TypeAlias = Callable[[str, int, Block, Block], Block]
"""A server's own step for one block of a tensor of floats: tensor, index of the block's first element, the block of the
current model, the mean difference of the updates from it; the block of the next model. float32 or float64."""


class WeightedMean:
    """A running weighted mean over updates of one schema; `result` ends one and the next `fold` begins another.

    Updates are folded only whole and only after `fl.guard.gate.admit_update`; all have the same `params_type`. With two
    updates the result does not depend on their order; with more, only in the last bits of rounding.
    """

    def __init__(self, schema: Schema, params_type: ParamsType, spool: Spool | None = None) -> None:
        """Where the sums are too large for memory they lie in the `spool`, if there is one."""
        self._schema = schema
        self._params_type = params_type
        self._spool = spool
        self._total = 0.0
        self._sums: _Sums | None = None
        self.count = 0
        """How many updates were folded."""

    def fold(self, update: TensorFile, weight: float, site: str = "") -> None:
        """Add an admitted update with `weight` > 0; a mean does not ask of which site."""
        sums = self._sums = self._sums or _sums(self._schema, self._spool)
        for name, spec in self._schema.items():
            dtype = _sum_dtype(spec)
            factor = dtype.type(weight)
            scratch = np.empty(min(BLOCK, spec.elements), dtype=dtype)
            for start, block in update.blocks(name):
                part = sums.block(name, start, block.size, fresh=not self.count)
                if not self.count:
                    np.multiply(block, factor, out=part, dtype=dtype, casting="same_kind")
                else:
                    scaled = scratch[: block.size]
                    np.multiply(block, factor, out=scaled, dtype=dtype, casting="same_kind")
                    part += scaled
                sums.keep(name, start, part)
        self._total += weight
        self.count += 1

    def close(self) -> None:
        """Give the sums back."""
        if self._sums is not None:
            self._sums.close()
            self._sums = None

    def result(self, model: TensorFile, step: ServerStep | None = None) -> Stored:
        """The next global model: the mean itself, or `model` plus the mean of differences; floats by `step` if given.

        Integers are rounded to the nearest; booleans are true where the mean is at least one half.
        """
        sums = self._sums
        if sums is None or not self.count:
            raise ValueError("no update was folded")
        header, offsets, size = layout(self._schema)
        with ModelDraft(size, self._spool) as draft:
            draft.append(header)
            for name in sorted(self._schema, key=lambda name: offsets[name]):
                spec = self._schema[name]
                dtype = _sum_dtype(spec)
                for start in range(0, spec.elements, BLOCK):
                    end = min(start + BLOCK, spec.elements)
                    mean = sums.block(name, start, end - start)
                    mean /= dtype.type(self._total)  # in place: the sums are not needed any more
                    if step is not None and spec.dtype in FLOATS:
                        current = model.block(name, start, end).astype(dtype, copy=False)
                        difference = mean if self._params_type is ParamsType.DIFF else mean - current
                        mean = step(name, start, current, difference)
                    elif self._params_type is ParamsType.DIFF:
                        mean += model.block(name, start, end).astype(dtype, copy=False)
                    draft.append(as_dtype(mean, spec.dtype).view(np.uint8).data)
                sums.done(name)
            self._total, self.count = 0.0, 0
            self.close()  # until the next update comes a server has the model alone
            return draft.seal()


def _sum_dtype(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(np.float32 if spec.dtype in {"F32", "F16", "BF16"} else np.float64)


def _sums(schema: Schema, spool: Spool | None) -> _Sums:
    size = sum(spec.elements * _sum_dtype(spec).itemsize for spec in schema.values())
    return _SpooledSums(schema, spool) if spool is not None and spool.takes(size) else _Sums(schema)


class _Sums:
    """Each tensor's running sum, laid flat, a block of BLOCK elements at a time; in memory."""

    def __init__(self, schema: Schema) -> None:
        self._arrays = {name: np.empty(spec.elements, dtype=_sum_dtype(spec)) for name, spec in schema.items()}

    def block(self, name: str, start: int, size: int, *, fresh: bool = False) -> Block:
        """`size` elements from `start` on; what a `fresh` one holds does not matter."""
        return self._arrays[name][start : start + size]

    def keep(self, name: str, start: int, block: Block) -> None:
        """A block was changed."""

    def done(self, name: str) -> None:
        """A tensor's sum is not needed any more."""
        del self._arrays[name]

    def close(self) -> None:
        """Give the sums back."""
        self._arrays.clear()


class _SpooledSums(_Sums):
    """The same in a spool: one block is one piece."""

    def __init__(self, schema: Schema, spool: Spool) -> None:
        self._file = spool.file(BLOCK * 8)
        self._dtypes = {name: _sum_dtype(spec) for name, spec in schema.items()}
        self._first: dict[str, int] = {}
        count = 0
        for name, spec in schema.items():
            self._first[name] = count
            count += -(-spec.elements // BLOCK)

    def block(self, name: str, start: int, size: int, *, fresh: bool = False) -> Block:
        if fresh:
            return np.empty(size, dtype=self._dtypes[name])
        return np.frombuffer(bytearray(self._file.read(self._first[name] + start // BLOCK)), dtype=self._dtypes[name])

    def keep(self, name: str, start: int, block: Block) -> None:
        self._file.write(self._first[name] + start // BLOCK, block.view(np.uint8).data)

    def done(self, name: str) -> None:
        """The disk's space is given back with the others'."""

    def close(self) -> None:
        self._file.close()


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
