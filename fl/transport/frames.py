"""Frames: what passes over gRPC. A frame is its header's length (u32, big-endian), the header (JSON), then a payload.

Headers are Pydantic models that refuse unknown fields; both parts are bounded. Each method of the service takes and
gives frames of the models named here, and nothing else.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from attestation.ears import MAX_EAR, MAX_EARS
from attestation.identity import MAX_CERTIFICATE
from fl.aggregation.mask_talk import MAX_PART, Step
from fl.errors import MalformedMessage
from fl.jobs.command import MAX_COMMAND
from fl.jobs.log_lines import MAX_LINE
from fl.jobs.progress import JobEvent, Line, Status
from fl.jobs.record import JobId, Time, UserName
from fl.jobs.settings import MAX_MODEL, Digest, Name, TaskKind
from fl.jobs.statement import SignedStatement
from fl.tensors import Buffer

MAX_HEADER: Final = 256 << 10
CHUNK: Final = 1 << 20
"""Bytes of payload in a chunk frame; the last of a transfer has fewer."""
MAX_FRAME: Final = MAX_HEADER + CHUNK + 4
METHOD_PREFIX: Final = "/sealwright.fl.v1.Federation/"

Token: TypeAlias = Annotated[str, Field(max_length=128 << 10)]
Size: TypeAlias = Annotated[int, Field(ge=0, le=MAX_MODEL)]


class Frame(BaseModel):
    """A header."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Lease(Frame):
    """First frame of both sides of an attendance, and again after each fresh attestation: the sender's current EARs.

    `certificate`: a newer one than that of the handshake, over the same key (DER, base64), since connections may
    outlive the day that a certificate lives.
    """

    kind: Literal["lease"] = "lease"
    ears: Annotated[tuple[Annotated[str, Field(max_length=MAX_EAR)], ...], Field(min_length=1, max_length=MAX_EARS)]
    certificate: Annotated[str, Field(max_length=2 * MAX_CERTIFICATE)] = ""


class Away(Frame):
    """Site to server, the last frame: a lease has ended, the site pauses and will connect again."""

    kind: Literal["away"] = "away"
    why: Line


class Prepare(Frame):
    """Server to site: there is a job for you."""

    kind: Literal["prepare"] = "prepare"
    job: JobId
    record: Token
    bundle_size: Size


class Ready(Frame):
    """Site to server: the job's script has started."""

    kind: Literal["ready"] = "ready"
    job: JobId


class Train(Frame):
    """Server to site: train this model, or what else `task` says."""

    kind: Literal["train"] = "train"
    task: TaskKind = "train"
    job: JobId
    round: Annotated[int, Field(ge=0)]
    total_rounds: int
    model_sha256: Digest
    model_size: Size


class Left(Frame):
    """Site to server: the site is out of the job, and why."""

    kind: Literal["left"] = "left"
    job: JobId
    reasons: Annotated[tuple[Line, ...], Field(min_length=1, max_length=64, strict=False)]


class Logged(Frame):
    """Site to server: a number that the script logged."""

    kind: Literal["logged"] = "logged"
    job: JobId
    key: Annotated[Line, Field(min_length=1, max_length=128)]
    value: float
    step: Annotated[int, Field(ge=0, lt=1 << 48)]


class Said(Frame):
    """Site to server: a line of text that the script logged."""

    kind: Literal["said"] = "said"
    job: JobId
    round: Annotated[int, Field(ge=0)]
    text: Annotated[Line, Field(min_length=1, max_length=MAX_LINE)]


class Finish(Frame):
    """Server to site: the job is over for you."""

    kind: Literal["finish"] = "finish"
    job: JobId
    why: Line


RunName: TypeAlias = Annotated[str, Field(pattern="^([0-9a-f]{32})?$")]
"""A server's own random name for the time from a job's start, or its resumption, to the server's end."""


class Masking(Frame):
    """Both ways: one step of secure aggregation (`fl.aggregation.mask_talk`), and the answer to it.

    What the server says may be in pieces: `more` of them follow. An answer is whole.
    """

    kind: Literal["masking"] = "masking"
    job: JobId
    round: Annotated[int, Field(ge=0)]
    step: Step
    body: Annotated[str, Field(max_length=MAX_PART)]
    more: bool = False
    run: RunName = ""


class Told(Frame):
    """Server to site: what a user has told it about a job, signed by the user."""

    kind: Literal["told"] = "told"
    job: JobId
    command: Annotated[str, Field(max_length=MAX_COMMAND)]


class Steer(Frame):
    """Server to site: what a user has told it about the site itself, signed by the user."""

    kind: Literal["steer"] = "steer"
    command: Annotated[str, Field(max_length=MAX_COMMAND)]


class Fetch(Frame):
    """Site to server: send this, from `offset` on."""

    kind: Literal["fetch"] = "fetch"
    job: JobId
    what: Literal["bundle", "model", "file"]
    sha256: Digest
    offset: Size


class Chunk(Frame):
    """A piece of a transfer, with the XXH3-64 of its payload."""

    kind: Literal["chunk"] = "chunk"
    offset: Size
    xxh3: Annotated[int, Field(ge=0, lt=1 << 64)]


class Deliver(Frame):
    """Site to server: here is my update."""

    kind: Literal["deliver"] = "deliver"
    job: JobId
    round: Annotated[int, Field(ge=0)]
    params_type: Literal["FULL", "DIFF"]
    weight: float
    metrics: Annotated[dict[str, float], Field(max_length=64)]
    size: Size
    transfer: Annotated[str, Field(pattern="^([0-9a-f]{32})?$")] = ""
    """The site's own random name for these bytes: what came under it before a cut need not come again."""
    run: RunName = ""
    """Of an update under masks: the server's run in which they were agreed on."""


class Pull(Frame):
    """Receiver of a delivery to its sender: send from `offset` on."""

    kind: Literal["pull"] = "pull"
    offset: Size


class Verdict(Frame):
    """What became of a delivery or of a submission: accepted, or every reason why not."""

    kind: Literal["verdict"] = "verdict"
    accepted: bool
    reasons: Annotated[tuple[Line, ...], Field(max_length=64, strict=False)] = ()


class Submit(Frame):
    """User to server: run this job. The bundle and the sealed first model follow, in this order, as chunks; nothing
    follows if both are those of an earlier job (`like`)."""

    kind: Literal["submit"] = "submit"
    record: Token
    bundle_size: Size
    model_size: Size
    like: JobId | None = None


class Origin(Frame):
    """Server to user: the record of the user's own job, which is to be cloned."""

    kind: Literal["origin"] = "origin"
    record: Token


class Order(Frame):
    """User to server, the one frame of every call but `Submit`: the signed command."""

    kind: Literal["order"] = "order"
    command: Annotated[str, Field(max_length=MAX_COMMAND)]


class JobReport(Frame):
    """Server to user: a job's state."""

    kind: Literal["report"] = "report"
    job: JobId
    name: Name
    status: Status
    submitter: UserName
    created: Time
    round: int | None
    num_rounds: int
    sites: Annotated[dict[str, Line], Field(max_length=4096)]
    reasons: Annotated[tuple[Line, ...], Field(max_length=64, strict=False)] = ()


class Reports(Frame):
    """Server to user: the newest jobs, and who is connected."""

    kind: Literal["reports"] = "reports"
    jobs: Annotated[tuple[JobReport, ...], Field(max_length=1000, strict=False)]
    sites: Annotated[tuple[Name, ...], Field(max_length=4096, strict=False)]
    """The sites that are connected."""


class SiteReport(Frame):
    """A site as its server sees it."""

    kind: Literal["site"] = "site"
    name: Name
    member: Name
    connected: Time | None
    """Since when; None: it is not."""
    lease_until: Time | None
    jobs: Annotated[dict[JobId, Line], Field(max_length=64)]
    """What it does in each job that runs and has it on its roster."""


class Places(Frame):
    """Server to user: the server itself, and every site that the charter knows."""

    kind: Literal["places"] = "places"
    server: Name
    member: Name
    serving: Time
    """Since when."""
    charter_version: int
    keeps_jobs: bool
    """Whether jobs and results outlive the server's process."""
    jobs: Annotated[dict[Status, int], Field(strict=False)]
    """How many the server knows, by status."""
    sites: Annotated[tuple[SiteReport, ...], Field(max_length=1000, strict=False)]


class Happened(Frame):
    """Server to user: an event of a job that is watched."""

    kind: Literal["happened"] = "happened"
    event: JobEvent


class Result(Frame):
    """Server to user: a result's head; its sealed payload follows as chunks."""

    kind: Literal["result"] = "result"
    record: Token
    statement: SignedStatement
    sealed_key: Annotated[str, Field(max_length=4096)]
    """Base64: the result's key, sealed to the user's results key."""
    size: Size
    receipt: Annotated[str, Field(max_length=64 << 10)] = ""
    """The ledger's receipt for the statement, as JSON, if the ledger gave one."""


FromAttendingSite: TypeAlias = Lease | Away | Ready | Left | Logged | Said | Masking
ToAttendingSite: TypeAlias = Lease | Prepare | Train | Finish | Told | Steer | Masking
FROM_ATTENDING_SITE: Final = TypeAdapter[FromAttendingSite](Annotated[FromAttendingSite, Field(discriminator="kind")])
TO_ATTENDING_SITE: Final = TypeAdapter[ToAttendingSite](Annotated[ToAttendingSite, Field(discriminator="kind")])

T = TypeVar("T")


def pack(header: Frame, payload: Buffer = b"") -> bytes:
    """One frame."""
    text = header.model_dump_json().encode()
    if len(text) > MAX_HEADER:
        raise MalformedMessage(f"a header of {len(text)} bytes is over the limit of {MAX_HEADER}", where="frame")
    return b"".join((struct.pack(">I", len(text)), text, payload))


def unpack(adapter: TypeAdapter[T], raw: bytes, *, where: str) -> tuple[T, memoryview]:
    """A frame's header, by the models that may come here, and its payload. Raises MalformedMessage."""
    view = memoryview(raw)
    if len(view) < 4 or len(view) > MAX_FRAME:
        raise MalformedMessage(f"a frame has {len(view)} bytes", where=where)
    (length,) = struct.unpack_from(">I", view)
    if length > MAX_HEADER or length > len(view) - 4:
        raise MalformedMessage(f"a frame's header says {length} bytes", where=where)
    try:
        header = adapter.validate_json(bytes(view[4 : 4 + length]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "frame"
        raise MalformedMessage(f"a frame is malformed at {place}: {first['msg']}", where=where) from error
    return header, view[4 + length :]


def adapter_of(kind: type[T]) -> TypeAdapter[T]:
    """The adapter for a place where only one model may come."""
    return TypeAdapter(kind)
