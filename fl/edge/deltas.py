"""How a device's difference from a model travels: a safetensors file in one of three encodings, compressed or not.

- `f32`: each tensor of floats as F32.
- `bf16` and `int8`: in the forms of `fl.aggregation.deltas`, without error feedback, as a device comes once. For int8
  rounding is random in proportion, so that the mean of many devices' errors tends to zero (QSGD, Alistarh et al. 2017).

Compression is zlib (RFC 1950). Its content is bounded by the model's size before anything is inflated.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from fl.aggregation.deltas import DTYPE, SCALE, STEPS, encoded_schema, scale_of
from fl.edge.contract import Tensors
from fl.edge.messages import Encoding
from fl.errors import MalformedTensors
from fl.tensors import Buffer, Schema, TensorFile, TensorSpec, encode, layout, narrow_bf16, parse, widen_bf16

LEVEL: Final = 1
"""zlib's level: the fastest, since weights compress little at any."""
_SLACK: Final = 64 << 10
"""Bytes that another library's header may have beyond ours."""


MAX_KNOWN_HEADERS: Final = 16
MAX_KNOWN_HEADER: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class DeltaForm:
    """What differences from one model look like in one encoding, worked out once: their tensors, and the most bytes of
    their file (not compressed)."""

    encoding: Encoding
    schema: Schema
    """The model's tensors of floats."""
    encoded: Schema
    most: int
    data: int
    """Bytes of its tensors."""
    _starts: dict[bytes, Mapping[str, int]] = field(default_factory=dict, repr=False, compare=False)
    """Headers that were read and found right, and where their tensors begin: devices of one kind write the same."""

    @classmethod
    def of(cls, schema: Schema, encoding: Encoding) -> Self:
        """The form for a model with these tensors of floats."""
        encoded = encoded_schema(schema, encoding)
        return cls(encoding, schema, encoded, layout(encoded)[2] + _SLACK, sum(one.size for one in encoded.values()))


def encode_delta(tensors: Tensors, encoding: Encoding, rng: np.random.Generator, *, compressed: bool) -> bytes:
    """Write finite float32 `tensors`. Raises MalformedTensors for a number that is not finite."""
    parts: dict[str, tuple[TensorSpec, Buffer]] = {}
    for name, values in tensors.items():
        array = np.asarray(values, dtype="<f4", order="C")
        if not np.isfinite(array).all():
            raise MalformedTensors(f"tensor {name!r} holds a number that is not finite", where="difference")
        spec = TensorSpec(DTYPE[encoding], array.shape)
        if encoding == "f32":
            parts[name] = spec, array.tobytes()
        elif encoding == "bf16":
            parts[name] = spec, narrow_bf16(array).astype("<u2").tobytes()
        else:
            scale = np.float32(np.abs(array).max(initial=0.0) / np.float32(STEPS))
            steps = array / scale if scale > 0 else np.zeros_like(array)
            low = np.floor(steps)
            up = rng.random(array.shape, dtype=np.float32) < steps - low
            parts[name] = spec, np.clip(low + up, -STEPS, STEPS).astype(np.int8).tobytes()
            parts[name + SCALE] = TensorSpec("F32", ()), scale.astype("<f4").tobytes()
    raw = encode(parts)
    return zlib.compress(raw, LEVEL) if compressed else raw


def decode_delta(raw: Buffer, form: DeltaForm, *, compressed: bool) -> dict[str, npt.NDArray[np.float32]]:
    """Read a difference of this form: float32, each of the model's shape.

    The arrays may be read-only views of `raw`. Whether the numbers are finite is the caller's to check. Raises
    MalformedTensors for anything that is not exactly such a difference.
    """
    encoding = form.encoding
    file = _read(_inflated(raw, form.most) if compressed else raw, form)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name in form.schema:
        array = file.array(name)
        if encoding == "bf16":
            array = widen_bf16(array)
        elif encoding == "int8":
            array = array.astype(np.float32) * scale_of(file, name)
        found[name] = array
    return found


def _read(content: Buffer, form: DeltaForm) -> TensorFile:
    """The file in `content`, whose header is read once for all that have the same."""
    view = memoryview(content).cast("B")
    size = 8 + int.from_bytes(view[:8], "little")
    header = bytes(view[:size]) if size <= MAX_KNOWN_HEADER else b""
    starts = form._starts.get(header)
    if starts is not None and len(view) == size + form.data:
        return TensorFile(view, form.encoded, starts, {})
    file = parse(content, max_size=form.most, where="difference")
    if file.schema != form.encoded:
        raise MalformedTensors(f"its tensors are not those of the model as {form.encoding}", where="difference")
    if header and len(form._starts) < MAX_KNOWN_HEADERS:
        form._starts[header] = file.starts
    return file


def _inflated(raw: Buffer, most: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(raw, most + 1)
    except zlib.error as error:
        raise MalformedTensors("it is not compressed as it says", where="difference") from error
    if len(content) > most or not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise MalformedTensors(
            f"it inflates to more than {most} bytes, is cut off, or bytes follow", where="difference"
        )
    return content
