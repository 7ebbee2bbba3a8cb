"""Safetensors, strictly: the one form in which weights travel.

The format (https://huggingface.co/docs/safetensors): a little-endian u64 header length, a JSON header that gives each
tensor its dtype, shape and byte range, then the bytes. `parse` accepts only files whose ranges cover the data part
exactly once, within bounds that are checked before anything is allocated; it copies nothing. `encode` writes tensors
sorted by descending alignment, then name, so that equal tensors have equal bytes and one content address.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fl.errors import MalformedTensors

ITEM_SIZE: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element of each dtype that may travel."""

NUMPY_DTYPE: Final[Mapping[str, str]] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""NumPy's dtype for each; BF16, which NumPy lacks, as its raw 16 bits."""

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
MAX_HEADER: Final = 16 << 20
MAX_TENSORS: Final = 100_000
MAX_NAME: Final = 512
MAX_RANK: Final = 16
BLOCK: Final = 1 << 18
"""Elements that are converted or checked at a time, so that temporary memory fits a processor's cache."""

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype (safetensors' name) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size(self) -> int:
        """How many bytes the tensor has."""
        return self.elements * ITEM_SIZE[self.dtype]


Schema: TypeAlias = Mapping[str, TensorSpec]
"""What a model's tensors are called, and what each is."""


class Source(Protocol):
    """Bytes that lie elsewhere and are read when they are needed."""

    @property
    def size(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop`."""


class TensorFile:
    """A parsed safetensors file over bytes that someone else keeps (often a mapping of a sealed memory file)."""

    def __init__(
        self, source: memoryview | Source, schema: Schema, starts: Mapping[str, int], metadata: Mapping[str, str]
    ) -> None:
        self._source = source
        self.schema = schema
        self.metadata = metadata
        self._starts = starts

    @property
    def starts(self) -> Mapping[str, int]:
        """At which byte of the file each tensor begins."""
        return self._starts

    @property
    def raw(self) -> memoryview:
        """The whole file's bytes."""
        return self._source if isinstance(self._source, memoryview) else self._source.read(0, self._source.size)

    def release(self) -> None:
        """Let go of the bytes, so that who keeps them may give them back; nothing can be read any more."""
        if isinstance(self._source, memoryview):
            self._source.release()

    def _read(self, start: int, stop: int) -> memoryview:
        return self._source[start:stop] if isinstance(self._source, memoryview) else self._source.read(start, stop)

    def bytes_of(self, name: str) -> memoryview:
        """The tensor's bytes, uncopied."""
        start = self._starts[name]
        return self._read(start, start + self.schema[name].size)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a NumPy array over the same bytes; BF16 as `uint16` bits."""
        spec = self.schema[name]
        return np.frombuffer(self.bytes_of(name), dtype=NUMPY_DTYPE[spec.dtype]).reshape(spec.shape)

    def block(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Elements `first` to `last` of the tensor laid flat; BF16 widened to F32."""
        spec, start = self.schema[name], self._starts[name]
        width = ITEM_SIZE[spec.dtype]
        raw = self._read(start + first * width, start + last * width)
        found = np.frombuffer(raw, dtype=NUMPY_DTYPE[spec.dtype])
        return widen_bf16(found) if spec.dtype == "BF16" else found

    def blocks(self, name: str) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The tensor's elements in flat blocks, each with its first index; BF16 widened to F32."""
        elements = self.schema[name].elements
        for start in range(0, elements, BLOCK):
            yield start, self.block(name, start, min(start + BLOCK, elements))


def widen_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 bits as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite float32 values rounded to nearest-even BF16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def parse(raw: Buffer | Source, *, max_size: int, where: str = "safetensors") -> TensorFile:
    """Parse one whole safetensors file of at most `max_size` bytes.

    Raises MalformedTensors for every deviation: header length, duplicate keys, unknown dtypes or fields, shapes that do
    not match their ranges, ranges that overlap, leave holes or do not end with the file.
    """
    source: memoryview | Source
    source = memoryview(raw).cast("B") if isinstance(raw, bytes | bytearray | memoryview) else raw
    whole = len(source) if isinstance(source, memoryview) else source.size

    def read(start: int, stop: int) -> memoryview:
        return source[start:stop] if isinstance(source, memoryview) else source.read(start, stop)

    if whole > max_size:
        raise MalformedTensors(f"the file has {whole} bytes, more than the {max_size} that are allowed", where=where)
    if whole < 8:
        raise MalformedTensors("the file ends before its header length", where=where)
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > MAX_HEADER or length > whole - 8:
        raise MalformedTensors(f"the header says {length} bytes, more than the file or the limit has", where=where)
    header = _read_header(bytes(read(8, 8 + length)), where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedTensors("__metadata__ is not a map of strings", where=where)
    if len(header) > MAX_TENSORS:
        raise MalformedTensors(f"there are {len(header)} tensors, more than {MAX_TENSORS}", where=where)
    data = 8 + length
    schema: dict[str, TensorSpec] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        spec, begin, end = _read_entry(name, entry, where)
        schema[name] = spec
        ranges.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise MalformedTensors(
                f"tensor {name!r} begins at {begin}, not at {at}: ranges overlap or leave a hole", where=where
            )
        at = end
    if data + at != whole:
        raise MalformedTensors(f"{whole - data - at} bytes follow the last tensor", where=where)
    return TensorFile(source, schema, {name: data + begin for begin, _, name in ranges}, metadata)


def _read_header(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise MalformedTensors("a key of the header is given twice", where=where)
        return found

    if not text.startswith(b"{"):
        raise MalformedTensors("the header does not begin with {", where=where)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise MalformedTensors("the header is not JSON", where=where) from error
    if not isinstance(header, dict):
        raise MalformedTensors("the header is not a JSON object", where=where)
    return header


def _read_entry(name: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise MalformedTensors(f"a tensor's name has {len(name)} characters or unprintable ones", where=where)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedTensors(f"tensor {name!r} has not exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise MalformedTensors(f"tensor {name!r} has a dtype that may not travel", where=where)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_count(size) for size in shape):
        raise MalformedTensors(f"tensor {name!r} has a shape that is none", where=where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise MalformedTensors(f"tensor {name!r} has data_offsets that are none", where=where)
    spec = TensorSpec(dtype, tuple(shape))
    begin, end = offsets
    if end - begin != spec.size:
        raise MalformedTensors(
            f"tensor {name!r} has a range of {end - begin} bytes for a shape of {spec.size}", where=where
        )
    return spec, begin, end


def _is_count(value: Any) -> bool:
    # Sizes stay below 2**48, so that products of a bounded rank are cheap to compute and never wrap anything.
    return type(value) is int and 0 <= value < 1 << 48


def layout(schema: Schema) -> tuple[bytes, dict[str, int], int]:
    """Where each tensor goes: the header with its length, each tensor's offset in the file, the file's size."""
    order = sorted(schema, key=lambda name: (-ITEM_SIZE[schema[name].dtype], name))
    header: dict[str, Any] = {}
    at = 0
    for name in order:
        spec = schema[name]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.size]}
        at += spec.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    offsets = {name: begin + header[name]["data_offsets"][0] for name in order}
    return struct.pack("<Q", len(text)) + text, offsets, begin + at


def pieces(tensors: Mapping[str, tuple[TensorSpec, Buffer]]) -> tuple[int, Iterator[tuple[int, Buffer]]]:
    """The size of one safetensors file of `tensors`, and its parts from the first byte to the last, with their offsets.

    Raises ValueError, as they are taken, for a tensor whose bytes are not as many as its shape says.
    """
    header, offsets, size = layout({name: spec for name, (spec, _) in tensors.items()})

    def parts() -> Iterator[tuple[int, Buffer]]:
        yield 0, header
        for name in sorted(tensors, key=lambda name: offsets[name]):
            spec, raw = tensors[name]
            data = memoryview(raw).cast("B")
            if len(data) != spec.size:
                raise ValueError(f"tensor {name!r} has {len(data)} bytes for a shape of {spec.size}")
            yield offsets[name], data

    return size, parts()


def encode(tensors: Mapping[str, tuple[TensorSpec, Buffer]]) -> bytes:
    """One safetensors file of `tensors`."""
    return b"".join(part for _, part in pieces(tensors)[1])
