"""What a gateway's processes say to each other over a socket: u32 length of a JSON header, u64 length of a body, both.

Above is the process that has the guest's credential and the tree's link, below are the workers that serve devices
(docs/adr/0043). A worker faces strangers, so what it says is read as strictly as what comes from another machine.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fl.edge.contract import MAX_VERSION
from fl.edge.partial_sum import MAX_VERSIONS
from fl.edge.wire import Origin
from fl.errors import MalformedMessage, PeerLost
from fl.jobs.record import JobId
from fl.jobs.settings import MAX_MODEL

MAX_HEADER: Final = 1 << 20
MAX_BODY: Final = MAX_MODEL
"""Bytes of a charter's files, a model or a graph."""
_LENGTHS: Final = struct.Struct(">IQ")

Total: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 48)]


class _Frame(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Standing(_Frame):
    """Who the gateway is now, as far as a worker has to know it; the body is the charter's files, if they are new.

    `at` is the guest's time in seconds at the running clock's `mark`. No `ears`: there is no lease now. `pace` is
    `fl.edge.gateway.Pace`; each of the `workers` has its part of what the gateway may hold.
    """

    kind: Literal["standing"] = "standing"
    role: str
    name: str
    sign_key: str = Field(repr=False)
    tls_key: str = Field(repr=False)
    chain: str
    trusted: str
    ears: tuple[str, ...]
    lease_ends: float
    group_key: str = Field(repr=False)
    at: float
    mark: float
    pace: tuple[float, float, float]
    workers: int


class Begun(_Frame):
    """A job begins: its `EdgeJob`, its task, the tensors that its updates have; the body is the task's graph."""

    kind: Literal["begun"] = "begun"
    job: JobId
    name: str
    method: str
    config: dict[str, Any]
    max_norm: float | None
    max_weight: float
    device_reuse: bool
    task_config: dict[str, Any]
    task_seconds: float
    tensors: dict[str, tuple[str, tuple[int, ...]]]


class Ended(_Frame):
    """A job is over here."""

    kind: Literal["ended"] = "ended"
    job: JobId


class Say(_Frame):
    """Report on each job whose last report was answered."""

    kind: Literal["say"] = "say"


class Version(_Frame):
    """A version of a job's model, which is the body."""

    kind: Literal["version"] = "version"
    job: JobId
    version: Annotated[int, Field(ge=0, lt=MAX_VERSION)]
    digest: str
    task: str


class Answered(_Frame):
    """The reply to a report; duplicates are the body."""

    kind: Literal["answered"] = "answered"
    job: JobId
    granted: Total
    alive: Annotated[tuple[int, ...], Field(max_length=MAX_VERSIONS)]
    over: bool


class Told(_Frame):
    """From a worker: a job's report (`fl.edge.exchange.Report`); the body is claims and sum (`fl.edge.wire`)."""

    kind: Literal["told"] = "told"
    job: JobId
    origin: Origin
    returned: Total
    waiting: Total


class Ready(_Frame):
    """From a worker: it has all it needs to serve."""

    kind: Literal["ready"] = "ready"


class Line(_Frame):
    """From a worker: a line for the guest's log."""

    kind: Literal["line"] = "line"
    text: Annotated[str, Field(max_length=1000)]


FROM_ABOVE: Final = TypeAdapter[Standing | Begun | Ended | Say | Version | Answered](
    Annotated[Standing | Begun | Ended | Say | Version | Answered, Field(discriminator="kind")]
)
FROM_WORKER: Final = TypeAdapter[Told | Ready | Line](Annotated[Told | Ready | Line, Field(discriminator="kind")])
_F = TypeVar("_F")


def send(to: socket.socket, frame: BaseModel, body: bytes = b"") -> None:
    """Send a frame. Raises OSError, TimeoutError by the socket's own limit."""
    header = frame.model_dump_json().encode()
    to.sendall(_LENGTHS.pack(len(header), len(body)) + header)
    if body:
        to.sendall(body)


def receive(source: socket.socket, kinds: TypeAdapter[_F], *, most: int) -> tuple[_F, bytes]:
    """The next frame, with a body of at most `most` bytes. Raises PeerLost at the end, MalformedMessage, OSError."""
    head, size = _LENGTHS.unpack(_exactly(source, _LENGTHS.size))
    if head > MAX_HEADER or size > most:
        raise MalformedMessage(f"a frame has {head} and {size} bytes, more than it may", where="gateway's worker")
    raw = _exactly(source, head)
    try:
        frame = kinds.validate_json(raw)
    except (ValidationError, json.JSONDecodeError, RecursionError) as error:
        raise MalformedMessage("a frame is malformed", where="gateway's worker") from error
    return frame, _exactly(source, size)


def _exactly(source: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    view, at = memoryview(found), 0
    while at < size:
        count = source.recv_into(view[at:])
        if count == 0:
            raise PeerLost("the other process has ended", where="gateway's worker")
        at += count
    return bytes(found)
