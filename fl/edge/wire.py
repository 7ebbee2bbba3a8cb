"""Reports and replies between tiers as bytes: u32 (big-endian) length of a JSON header, the header, then what it names.

A report's header has the groups of claims `{"origin", "version", "count"}` and the size of the partial sum; the ids
follow group by group, each 32 bytes, ascending, then the partial sum (`fl.edge.partial_sum`). A reply's header has the
groups of duplicates `{"origin", "count"}`; their ids follow.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl.edge.contract import ID_BYTES, MAX_VERSION
from fl.edge.exchange import Report
from fl.edge.partial_sum import MAX_IDS, MAX_VERSIONS, PartialSum, max_size
from fl.edge.permits import Demand
from fl.errors import MalformedMessage
from fl.tensors import Buffer, Schema

MAX_GROUPS: Final = 4096
MAX_CLAIMS: Final = 1 << 18
"""Contributions that are claimed in one exchange."""
MAX_HEADER: Final = 1 << 20
_LENGTH: Final = struct.Struct(">I")

Origin = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
T = TypeVar("T", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Claimed(_Strict):
    origin: Origin
    version: int = Field(ge=0, lt=MAX_VERSION)
    count: int = Field(ge=1, le=MAX_CLAIMS)


class _ReportHead(_Strict):
    claims: Annotated[tuple[_Claimed, ...], Field(max_length=MAX_GROUPS, strict=False)]
    partial: int = Field(ge=0, lt=1 << 48)


class _Refused(_Strict):
    origin: Origin
    count: int = Field(ge=1, le=MAX_CLAIMS)


class _ReplyHead(_Strict):
    duplicates: Annotated[tuple[_Refused, ...], Field(max_length=MAX_GROUPS, strict=False)]


def max_report(schema: Schema) -> int:
    """The most bytes of a report in a job whose updates have this schema."""
    return _LENGTH.size + MAX_HEADER + MAX_CLAIMS * ID_BYTES + max_size(schema, MAX_VERSIONS, MAX_IDS)


MAX_REPLY: Final = _LENGTH.size + MAX_HEADER + MAX_CLAIMS * ID_BYTES


def encode_report(report: Report) -> bytes:
    """What of a report is not in its frame: claims and the partial sum; empty if there is neither."""
    groups = [(origin, v, ids) for origin, each in sorted(report.claims.items()) for v, ids in sorted(each.items())]
    partial = b"" if report.partial is None else report.partial.encoded()
    if not groups and not partial:
        return b""
    said = [{"origin": origin, "version": version, "count": len(ids)} for origin, version, ids in groups]
    return b"".join((_headed({"claims": said, "partial": len(partial)}), *(b"".join(i) for *_, i in groups), partial))


def decode_report(raw: Buffer, origin: str, demand: Demand, schema: Schema, *, where: str) -> Report:
    """The report of the child's start `origin`. Raises MalformedMessage."""
    if not len(raw):
        return Report(origin, demand)
    view = memoryview(raw).cast("B")
    head, at = _head(_ReportHead, view, where)
    if sum(group.count for group in head.claims) > MAX_CLAIMS:
        raise MalformedMessage(f"a report claims more than {MAX_CLAIMS} contributions", where=where)
    claims: dict[str, dict[int, list[bytes]]] = {}
    for group in head.claims:
        of_origin = claims.setdefault(group.origin, {})
        if group.version in of_origin:
            raise MalformedMessage("a report has a group of claims twice", where=where)
        of_origin[group.version] = _ids(view, at, group.count, where)
        at += group.count * ID_BYTES
    if at + head.partial != len(view):
        raise MalformedMessage("a report is not as long as its header says", where=where)
    partial = PartialSum.decoded(view[at:], schema, where=where) if head.partial else None
    return Report(origin, demand, claims, partial)


def encode_duplicates(duplicates: Mapping[str, Iterable[bytes]]) -> bytes:
    """The ids of a reply; empty if there is none."""
    groups = [(origin, sorted(ids)) for origin, ids in sorted(duplicates.items()) if ids]
    if not groups:
        return b""
    head = _headed({"duplicates": [{"origin": origin, "count": len(ids)} for origin, ids in groups]})
    return head + b"".join(b"".join(ids) for _, ids in groups)


def decode_duplicates(raw: Buffer, *, where: str) -> dict[str, frozenset[bytes]]:
    """The ids of a reply, by origin. Raises MalformedMessage."""
    if not len(raw):
        return {}
    view = memoryview(raw).cast("B")
    head, at = _head(_ReplyHead, view, where)
    found: dict[str, frozenset[bytes]] = {}
    for group in head.duplicates:
        if group.origin in found:
            raise MalformedMessage("a reply has a group twice", where=where)
        found[group.origin] = frozenset(_ids(view, at, group.count, where))
        at += group.count * ID_BYTES
    if at != len(view):
        raise MalformedMessage("a reply is not as long as its header says", where=where)
    return found


def _headed(head: Mapping[str, Any]) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text


def _head(kind: type[T], view: memoryview, where: str) -> tuple[T, int]:
    """The header of this kind, and where it ends."""
    length = _LENGTH.unpack_from(view)[0] if len(view) >= _LENGTH.size else len(view)
    end = _LENGTH.size + length
    if length > MAX_HEADER or end > len(view):
        raise MalformedMessage("a header is longer than what there is, or than it may be", where=where)
    try:
        return kind.model_validate(json.loads(bytes(view[_LENGTH.size : end]))), end
    except (ValidationError, ValueError, RecursionError) as error:
        raise MalformedMessage("a header is malformed", where=where) from error


def _ids(view: memoryview, at: int, count: int, where: str) -> list[bytes]:
    raw = bytes(view[at : at + count * ID_BYTES])
    if len(raw) != count * ID_BYTES:
        raise MalformedMessage("there are fewer ids than the header says", where=where)
    ids = [raw[start : start + ID_BYTES] for start in range(0, len(raw), ID_BYTES)]
    if any(first >= second for first, second in pairwise(ids)):
        raise MalformedMessage("ids are not ascending", where=where)
    return ids
