"""How the differences that updates are travel in fewer bytes: two or one for a number, and what that costs is made up.

- `bf16`: each tensor as BF16, rounded to nearest even: a relative error of at most 2**-8.
- `int8`: as I8 with one scale, the F32 scalar `NAME#scale`: value = scale * integer, scale = max |value| / 127.

Error feedback (Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes"): what rounding took from one difference is added to the next, so that
over the rounds nothing is lost but what the last one rounded away.

A site encodes what has passed its export gate, as the last thing that happens to it: what was clipped and noised has
been by then, and what is kept for the next round is of numbers that may leave. Who receives an update decodes it
before it checks it.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fl.errors import MalformedTensors
from fl.tensors import BLOCK, NUMPY_DTYPE, Schema, TensorFile, TensorSpec, layout, narrow_bf16, widen_bf16
from fl.transport.memory import DraftMemory, SealedMemory

Delta: TypeAlias = Literal["bf16", "int8"]

SCALE: Final = "#scale"
STEPS: Final = 127
DTYPE: Final = {"f32": "F32", "bf16": "BF16", "int8": "I8"}
"""Each form's dtype; `f32` is one that devices have beside the two (`fl.edge.deltas`)."""


def encoded_schema(schema: Schema, form: Literal["f32", "bf16", "int8"]) -> dict[str, TensorSpec]:
    """The tensors that a difference from a model of floats has when it travels."""
    found = {name: TensorSpec(DTYPE[form], spec.shape) for name, spec in schema.items()}
    if form == "int8":
        found |= {name + SCALE: TensorSpec("F32", ()) for name in schema}
    return found


def scale_of(file: TensorFile, name: str) -> np.float32:
    """The scale of an int8 tensor. Raises MalformedTensors for one that is below 0 or not finite."""
    scale = np.float32(file.array(name + SCALE)[()])
    if not 0 <= scale < np.inf:
        raise MalformedTensors(f"the scale of tensor {name!r} is {scale}", where="difference")
    return scale


class ErrorFeedback:
    """One site's encoder in one job: it keeps what rounding took, as large as a model of float32. For one thread."""

    def __init__(self, schema: Schema, delta: Delta) -> None:
        self._schema = schema
        self._delta = delta
        self._encoded = encoded_schema(schema, delta)
        self._owed: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(spec.elements, dtype=np.float64 if spec.dtype == "F64" else np.float32)
            for name, spec in schema.items()
        }

    def encoded(self, difference: SealedMemory) -> SealedMemory:
        """The difference, which is finite, as it travels, with what was owed from before. Both are the caller's."""
        header, offsets, size = layout(self._encoded)
        file = difference.tensors()
        with DraftMemory(size) as draft:
            draft.write(0, header)
            for name, owed in self._owed.items():
                largest = 0.0
                for start, block in file.blocks(name):
                    part = owed[start : start + block.size]
                    part += block
                    largest = max(largest, float(part.max()), -float(part.min()))
                scale = np.float32(largest / STEPS)
                if self._delta == "int8":
                    draft.write(offsets[name + SCALE], scale.tobytes())
                for start, _ in file.blocks(name):
                    part = owed[start : start + BLOCK]
                    codes, sent = _rounded(part, scale) if self._delta == "int8" else _narrowed(part)
                    draft.write(offsets[name] + start * codes.itemsize, codes.view(np.uint8).data)
                    part -= sent
            file.release()
            return SealedMemory(*draft.seal())


def _rounded(values: npt.NDArray[Any], scale: np.float32) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    if not scale > 0:
        return np.zeros(values.size, dtype=np.int8), np.zeros(values.size, dtype=values.dtype)
    codes = np.clip(np.rint(values / scale), -STEPS, STEPS).astype(np.int8)
    return codes, codes * scale


def _narrowed(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[Any]]:
    codes = narrow_bf16(values.astype(np.float32, copy=False))
    return codes, widen_bf16(codes)


class DecodedTensors(TensorFile):
    """An encoded difference, decoded block by block as it is read: of the model's names and shapes.

    What is checked and what is folded are the same numbers.
    """

    def __init__(self, encoded: TensorFile, schema: Schema, delta: Delta) -> None:
        """Raises MalformedTensors unless its tensors are exactly those of an encoded difference."""
        wanted = encoded_schema(schema, delta)
        for name in sorted(wanted.keys() | encoded.schema.keys()):
            if wanted.get(name) != encoded.schema.get(name):
                raise MalformedTensors(f"tensor {name!r} is not what a difference in {delta} has", where="difference")
        super().__init__(encoded._source, schema, {}, {})
        self._encoded = encoded
        self._scales = {name: scale_of(encoded, name) for name in schema} if delta == "int8" else {}

    def block(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Elements `first` to `last` of the tensor laid flat, as float32."""
        codes = self._encoded.block(name, first, last)
        if name not in self._scales:
            return codes
        found: npt.NDArray[Any] = np.multiply(codes, self._scales[name], dtype=np.float32)
        return found

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor, decoded, as float32."""
        spec = self.schema[name]
        return self.block(name, 0, spec.elements).reshape(spec.shape)

    def bytes_of(self, name: str) -> memoryview:
        """The decoded tensor's bytes, in the model's dtype."""
        spec = self.schema[name]
        values = self.array(name).reshape(-1)
        stored = narrow_bf16(values) if spec.dtype == "BF16" else values.astype(NUMPY_DTYPE[spec.dtype])
        return memoryview(stored.view(np.uint8).data)
