"""Partial sums: what a gateway or an inner node has aggregated and its parent has not had yet, and their wire form.

For each version of the model: the sum of weight times difference over some devices, in float64, the sum of the weights,
the number of contributions, and each one's id. Sums of sums are sums, so the shape of the tree changes a result only in
float64's rounding: a relative error of at most the number of contributions times 2**-53.

The wire form is a u32 (big-endian) with the length of a JSON header, the header, then one safetensors file: F64 tensors
`VERSION/NAME` and, for each version, `VERSION#` with the ids (U8, count x 32, ascending).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl.edge.contract import ID_BYTES, MAX_VERSION, Tensors
from fl.errors import MalformedMessage, MalformedTensors
from fl.model import MAX_WEIGHT
from fl.tensors import FLOATS, Buffer, Schema, TensorSpec, encode, layout, parse

MAX_VERSIONS: Final = 64
"""Versions of the model that are alive at the same time."""
MAX_IDS: Final = 1 << 20
"""Contributions of one version in one partial sum."""
MAX_HEADER: Final = 64 << 10
_PREFIX: Final = 4


def float_schema(schema: Schema) -> Schema:
    """The tensors of floats of a model: those that updates have."""
    return {name: spec for name, spec in schema.items() if spec.dtype in FLOATS}


class VersionSum:
    """The running sum of one version's contributions. `schema` has tensors of floats alone."""

    def __init__(self, schema: Schema) -> None:
        self.sums: dict[str, npt.NDArray[np.float64]] = {
            name: np.zeros(spec.shape, dtype=np.float64) for name, spec in schema.items()
        }
        self.weight = 0.0
        self.ids: set[bytes] = set()

    @property
    def count(self) -> int:
        """How many contributions it has."""
        return len(self.ids)

    def fold(self, contribution: bytes, tensors: Tensors, weight: float, *, scale: float = 1.0) -> None:
        """Add one contribution: `weight` times `scale` times its difference. The caller has checked all of it."""
        for name, total in self.sums.items():
            total += np.multiply(tensors[name], weight * scale, dtype=np.float64, casting="same_kind")
        self.weight += weight
        self.ids.add(contribution)

    def merge(self, other: VersionSum) -> None:
        """Add another sum of the same schema whose contributions are not in this one."""
        for name, total in self.sums.items():
            total += other.sums[name]
        self.weight += other.weight
        self.ids |= other.ids


@dataclass(frozen=True, slots=True)
class PartialSum:
    """Sums by version. `origin` names this start of the node that made it, `sequence` numbers its partial sums.

    A parent takes each (origin, sequence) once, in order, so that one that is sent again after a cut counts once.
    """

    origin: str
    sequence: int
    versions: Mapping[int, VersionSum] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many contributions it has over all versions."""
        return sum(one.count for one in self.versions.values())

    def encoded(self) -> bytes:
        """The wire form."""
        header = json.dumps(
            {
                "origin": self.origin,
                "sequence": self.sequence,
                "versions": [
                    {"version": version, "count": one.count, "weight": one.weight}
                    for version, one in sorted(self.versions.items())
                ],
            },
            separators=(",", ":"),
        ).encode()
        tensors: dict[str, tuple[TensorSpec, Buffer]] = {}
        for version, one in self.versions.items():
            for name, total in one.sums.items():
                tensors[f"{version}/{name}"] = (TensorSpec("F64", total.shape), _raw(total))
            tensors[f"{version}#"] = (TensorSpec("U8", (one.count, ID_BYTES)), b"".join(sorted(one.ids)))
        return struct.pack(">I", len(header)) + header + encode(tensors)

    @classmethod
    def decoded(cls, raw: Buffer, schema: Schema, *, where: str) -> Self:
        """The partial sum in `raw`, whose tensors must be exactly those of floats of `schema`, for each version.

        Raises MalformedMessage for anything else: lengths, unknown fields, versions or ids twice, numbers that are not
        finite, a weight that does not fit the count.
        """
        try:
            return cls(*_read(memoryview(raw).cast("B"), schema, where))
        except (MalformedTensors, ValidationError, ValueError, RecursionError) as error:
            if isinstance(error, MalformedTensors):
                what = error.what
            elif isinstance(error, ValidationError):
                what = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            else:
                what = str(error)[:200]
            raise MalformedMessage(f"a partial sum is malformed: {what}", where=where) from error


class _VersionHead(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: int = Field(ge=0, lt=MAX_VERSION)
    count: int = Field(ge=1, le=MAX_IDS)
    weight: float = Field(gt=0)


class _Head(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    origin: str = Field(pattern="^[0-9a-f]{32}$")
    sequence: int = Field(ge=0, lt=1 << 48)
    versions: Annotated[tuple[_VersionHead, ...], Field(min_length=1, max_length=MAX_VERSIONS, strict=False)]


def max_size(schema: Schema, versions: int, ids: int) -> int:
    """The most bytes of a partial sum's wire form with so many versions and ids in all."""
    one = {f"{MAX_VERSION}/{name}": TensorSpec("F64", spec.shape) for name, spec in schema.items()}
    one[f"{MAX_VERSION}#"] = TensorSpec("U8", (MAX_IDS, ID_BYTES))
    header, _, size = layout(one)
    return _PREFIX + MAX_HEADER + versions * (size - MAX_IDS * ID_BYTES + len(header) + 64) + ids * ID_BYTES + 4096


def _read(raw: memoryview, schema: Schema, where: str) -> tuple[str, int, dict[int, VersionSum]]:
    if len(raw) < _PREFIX:
        raise ValueError("it ends before its header's length")
    (length,) = struct.unpack_from(">I", raw)
    if length > MAX_HEADER or length > len(raw) - _PREFIX:
        raise ValueError(f"the header says {length} bytes, more than there are or may be")
    head = _Head.model_validate(json.loads(bytes(raw[_PREFIX : _PREFIX + length]), object_pairs_hook=_unique))
    numbers = [one.version for one in head.versions]
    if sorted(set(numbers)) != numbers:
        raise ValueError("its versions are not ascending")
    ids = sum(one.count for one in head.versions)
    file = parse(raw[_PREFIX + length :], max_size=max_size(schema, len(numbers), ids), where=where)
    wanted = dict(_wanted(schema, head.versions))
    if file.schema != wanted or file.metadata:
        raise ValueError("its tensors are not those of its versions")
    found: dict[int, VersionSum] = {}
    for one in head.versions:
        if one.weight > one.count * MAX_WEIGHT:
            raise ValueError(f"version {one.version} weighs {one.weight} with {one.count} contributions")
        found[one.version] = total = VersionSum({})
        total.weight = one.weight
        total.ids = set(_ids(bytes(file.bytes_of(f"{one.version}#"))))
        for name in schema:
            array = file.array(f"{one.version}/{name}").copy()
            if not np.isfinite(array).all():
                raise ValueError(f"tensor {name!r} of version {one.version} is not finite")
            total.sums[name] = array
    return head.origin, head.sequence, found


def _wanted(schema: Schema, versions: Iterable[_VersionHead]) -> Iterator[tuple[str, TensorSpec]]:
    for one in versions:
        for name, spec in schema.items():
            yield f"{one.version}/{name}", TensorSpec("F64", spec.shape)
        yield f"{one.version}#", TensorSpec("U8", (one.count, ID_BYTES))


def _ids(raw: bytes) -> list[bytes]:
    ids = [raw[at : at + ID_BYTES] for at in range(0, len(raw), ID_BYTES)]
    if any(first >= second for first, second in pairwise(ids)):
        raise ValueError("its ids are not ascending")
    return ids


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key of the header is given twice")
    return found


def _raw(array: npt.NDArray[np.float64]) -> bytes:
    return array.astype("<f8", copy=False).tobytes()
