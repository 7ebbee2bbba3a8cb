"""The weighted mean of updates, one at a time: FederatedAveraging's server step (McMahan et al. 2017, Algorithm 1).

w_{t+1} = sum_k (n_k / n) w^k_{t+1}, with n_k the weight of site k's update and n their sum. Only the running sum is
kept, in float32 for floats of up to 32 bits and in float64 else, so that memory does not grow with the number of sites.
Where a round's first update has the sums' own numbers and may be changed, its memory becomes theirs, and then the next
model's: no number is moved, and no more memory is taken than the updates came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from fl.model import ParamsType
from fl.tensors import BLOCK, FLOATS, NUMPY_DTYPE, Buffer, Schema, TensorFile, TensorSpec, layout, narrow_bf16
from fl.transport.drafts import ModelDraft
from fl.transport.memory import ContentAddress, OpenMemory
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

    def fold(self, update: TensorFile, weight: float, site: str = "", memory: Stored | None = None) -> None:
        """Add an admitted update with `weight` > 0; a mean does not ask of which site.

        `memory`: where the update lies, if nobody needs it as it is any more.
        """
        if self._sums is None:
            self._sums = _sums(self._schema, self._spool, update, memory)
        sums = self._sums
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
        with sums.following(size, self._spool) as following:
            following.append(header)
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
                    following.append(as_dtype(mean, spec.dtype).view(np.uint8).data)
                sums.done(name)
            self._total, self.count = 0.0, 0
            self.close()  # until the next update comes a server has the model alone
            return following.seal()


def _sum_dtype(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(np.float32 if spec.dtype in {"F32", "F16", "BF16"} else np.float64)


def _sums(schema: Schema, spool: Spool | None, first: TensorFile, memory: Stored | None) -> _Sums:
    size = sum(spec.elements * _sum_dtype(spec).itemsize for spec in schema.values())
    if spool is not None and spool.takes(size):
        return _SpooledSums(schema, spool)
    if isinstance(memory, OpenMemory) and _is_laid_out(schema, first, memory):
        return _SumsInPlace(schema, memory, first.starts)
    return _Sums(schema)


def _is_laid_out(schema: Schema, update: TensorFile, memory: OpenMemory) -> bool:
    """Whether an update is byte for byte a model's file, of numbers that are those of its sums."""
    header, _, size = layout(schema)
    own = all(NUMPY_DTYPE[spec.dtype] == _sum_dtype(spec).str for spec in schema.values())
    return own and memory.size == size and memory.view[: len(header)] == header and update.schema == schema


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

    def following(self, size: int, spool: Spool | None) -> ModelDraft | _ModelInPlace:
        """Where the next model is made, from its first byte to its last, as the sums are read."""
        return ModelDraft(size, spool)


class _SumsInPlace(_Sums):
    """The same in the memory of a round's first update, which becomes that of the next model."""

    def __init__(self, schema: Schema, memory: OpenMemory, starts: Mapping[str, int]) -> None:
        self._memory: OpenMemory | None = memory.hand_over()
        self._arrays = {
            name: np.frombuffer(self._memory.view, _sum_dtype(spec), spec.elements, starts[name])
            for name, spec in schema.items()
        }

    def close(self) -> None:
        self._arrays.clear()
        if self._memory is not None:
            self._memory.close()

    def following(self, size: int, spool: Spool | None) -> _ModelInPlace:
        if self._memory is None:
            raise ValueError("these sums are a model already")
        memory, self._memory = self._memory, None
        return _ModelInPlace(memory)


class _ModelInPlace:
    """As ModelDraft, in memory whose numbers become the model's one after the other."""

    def __init__(self, memory: OpenMemory) -> None:
        self._memory: OpenMemory | None = memory
        self._bytes = np.frombuffer(memory.view, np.uint8)
        self._at = 0
        self._address = ContentAddress(memory.size)

    def append(self, piece: Buffer) -> None:
        """The bytes that follow, which may lie where they belong already, and may not change any more."""
        given = np.frombuffer(piece, np.uint8)
        here = self._bytes[self._at : self._at + given.size]
        if not np.may_share_memory(here, given):
            here[:] = given
        self._at += given.size
        self._address.add(here.data)

    def seal(self) -> OpenMemory:
        """The whole, named."""
        if self._memory is None or self._at != self._memory.size:
            raise ValueError(f"{self._at} bytes were written, which are not the whole model")
        model, self._memory = self._memory, None
        model.digest = self._address.end()
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._address.end()
        del self._bytes
        if self._memory is not None:
            self._memory.close()


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
