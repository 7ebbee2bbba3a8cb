"""What devices and gateways say to each other: the words of each message, strict and bounded.

Words are JSON in canonical form (RFC 8785), so that equal words have equal bytes; unknown fields, other types and
doubled keys are refused. How they are sealed is `fl.edge.sealing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attestation.canonical import canonical_bytes, read_canonical
from fl.edge.contract import MAX_VERSION
from fl.edge.mask_steps import MAX_BODY, Step
from fl.edge.protocol import Message, Status
from fl.edge.task import GraphFormat
from fl.errors import MalformedMessage
from fl.model import MAX_WEIGHT
from policies.devices import JobPattern
from policies.errors import Unusable

MAX_WORDS: Final = 256 << 10
"""Bytes of any message's words."""
MAX_RETRY_SECONDS: Final = 86400.0
PROOF_TYPE: Final = "sealwright-gateway-proof+jwt"
"""The `typ` of the word by which a gateway introduces itself to a device."""

Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$")]
Word = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Cookie = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,256}$")]
Version = Annotated[int, Field(ge=0, lt=MAX_VERSION)]
Encoding = Literal["f32", "bf16", "int8"]


class Words(BaseModel):
    """The words of one message."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """The canonical form."""
        return canonical_bytes(_whole(self.model_dump(mode="json")))


def _whole(value: Any) -> Any:
    """`value` with whole floats as integers, as JCS writes them: then the quick way to canonical bytes is open."""
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if type(value) is dict:
        return {name: _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if type(value) is list else value


class Request(Words):
    """What every request says: the device's token, a random id, and the key under which it is answered."""

    token: Annotated[str, StringConstraints(max_length=4096)] = Field(repr=False)
    request: Hex16
    answer_key: Hex32 = Field(repr=False)


class ProofRequest(Words):
    """What a device asks a gateway to prove itself over; not sealed."""

    nonce: Hex16


class JobRequest(Request):
    """`job`: is there a job for this device? `jobs`: the names in which its app takes part, or their beginning and `*`.

    `capabilities` are matched with what a job demands: each demanded one with the demanded value.
    """

    jobs: Annotated[tuple[JobPattern, ...], Field(min_length=1, max_length=64, strict=False)]
    capabilities: Annotated[dict[Word, Word], Field(max_length=64)] = {}


class TaskRequest(Request):
    """`task`: what is there to train? The gateway may hold the answer back for up to `wait_seconds`."""

    job: JobId
    wait_seconds: Annotated[float, Field(ge=0, le=20)] = 0.0


class SelectionRequest(Request):
    """`selection`: is the version that this device has a task for still trained?"""

    job: JobId
    version: Version


class ResultRequest(Request):
    """`result`: a difference from the version's model, as the tensors that follow the words (`fl.edge.deltas`).

    `weight` is usually the number of examples; `task` the task's digest; `cookie` that of the task's answer.
    """

    job: JobId
    version: Version
    task: Hex32
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)]
    encoding: Encoding
    compressed: bool
    cookie: Cookie


class MaskRequest(Request):
    """`mask`: a step of a masked sum. `body`: what the device says in this step.

    With the step `vector`, the masked difference follows as tensors.
    """

    job: JobId
    version: Version
    task: Hex32
    cookie: Cookie
    step: Step
    body: Annotated[str, StringConstraints(max_length=MAX_BODY)]


class Answer(Words):
    """What every answer says. `retry_seconds`: how long to wait before the next message, where the table says so."""

    status: Status
    message: Annotated[str, StringConstraints(max_length=500)] = ""
    retry_seconds: Annotated[float, Field(ge=0, le=MAX_RETRY_SECONDS)] = 0.0


class JobAnswer(Answer):
    """The job: its id, name, the method by which it aggregates, and the configuration that its author gave devices."""

    job: JobId | None = None
    name: Word | None = None
    method: Word | None = None
    config: dict[str, Any] = {}


class Blob(Words):
    """Something to fetch with `GET blobs/ID`: AES-256-GCM under `key`, zero nonce; `sha256` and `size` of the content.

    A key is made for this content alone, so that its one nonce is never used twice.
    """

    id: Hex32
    key: Hex32 = Field(repr=False)
    sha256: Hex32
    size: Annotated[int, Field(ge=1, lt=1 << 40)]


class Task(Words):
    """What to train. Its digest (`fl.edge.task.task_digest`) is over the job's name, format, graph and configuration.

    `cookie` comes back with the result. `ticket` is for an upload in pieces.
    """

    version: Version
    name: Word
    digest: Hex32
    format: GraphFormat
    config: dict[str, Any]
    graph: Blob
    model: Blob
    cookie: Cookie
    ticket: Cookie


class TaskAnswer(Answer):
    """The task, if the status is OK."""

    task: Task | None = None


class SelectionAnswer(Answer):
    """The versions to which results still count."""

    versions: Annotated[tuple[Version, ...], Field(max_length=64, strict=False)] = ()


class ResultAnswer(Answer):
    """What became of the result."""


class MaskAnswer(Answer):
    """The step that the device takes next, and what it has to know for it, if the status is OK."""

    step: Step | None = None
    body: Annotated[str, StringConstraints(max_length=200_000)] = ""


REQUESTS: Final[Mapping[Message, type[Request]]] = MappingProxyType(
    {
        "job": JobRequest,
        "task": TaskRequest,
        "selection": SelectionRequest,
        "result": ResultRequest,
        "mask": MaskRequest,
    }
)
ANSWERS: Final[Mapping[Message, type[Answer]]] = MappingProxyType(
    {"job": JobAnswer, "task": TaskAnswer, "selection": SelectionAnswer, "result": ResultAnswer, "mask": MaskAnswer}
)
_W = TypeVar("_W", bound=Words)


def read_words(kind: type[_W], raw: bytes, *, where: str) -> _W:
    """The words of `kind` in `raw`. Raises MalformedMessage for anything but their canonical form."""
    try:
        return kind.model_validate(read_canonical(raw, where=where, limit=MAX_WORDS))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise MalformedMessage(f"{place}: {first['msg']}", where=where) from error
    except Unusable as error:
        raise MalformedMessage(error.what, where=where) from error
