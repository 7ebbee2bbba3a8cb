"""The one socket between a training script and its site: small JSON messages, and models as sealed memory files.

It is a UNIX socket of type SEQPACKET, so that a message is whole or not there. Whoever is at the other end is not
trusted: sizes, fields and descriptors are checked before anything is used.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fl.errors import MalformedMessage
from fl.jobs.log_lines import MAX_LINE
from fl.jobs.settings import TaskKind

MAX_MESSAGE: Final = 32 << 10


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Hello(_Message):
    """The site greets its script: who and where it is."""

    kind: Literal["hello"] = "hello"
    site: str
    job_id: str
    job_name: str
    framework: Literal["numpy", "pytorch"]
    total_rounds: int
    data: str | None
    """The folder of the site's data, as the script sees it."""
    max_update: int
    """The most bytes that an update may have."""
    parameters: dict[str, float] = Field(default={}, max_length=64)
    """The recipe's constants that the script needs."""
    params_type: Literal["FULL", "DIFF"] = "FULL"
    """What the job's updates are; the client API makes one of the other."""
    receive_filters: Annotated[tuple[str, ...], Field(max_length=16, strict=False)] = ()
    send_filters: Annotated[tuple[str, ...], Field(max_length=16, strict=False)] = ()


class FoldedUpdate(_Message):
    """Of an update that an aggregator gets: whose it is, its weight, what its numbers are."""

    site: str
    weight: float
    params_type: Literal["FULL", "DIFF"]


class Training(_Message):
    """The site hands its script the model of a round, and says for what; the model comes as a descriptor."""

    kind: Literal["train"] = "train"
    task: TaskKind = "train"
    round: int
    total_rounds: int
    update: FoldedUpdate | None = None
    """For an aggregator of the job's own: the descriptor is not the model but this update's tensors."""


class End(_Message):
    """The job is over; the script may finish."""

    kind: Literal["end"] = "end"


class Answer(_Message):
    """The script hands over its update of a round; the tensors come as a descriptor."""

    kind: Literal["update"] = "update"
    round: int
    params_type: Literal["FULL", "DIFF"]
    metrics: dict[str, float] = Field(max_length=64)
    weight: float


class Value(_Message):
    """The script logs one number."""

    kind: Literal["log"] = "log"
    key: str = Field(min_length=1, max_length=128)
    value: float
    step: int = Field(ge=0, lt=1 << 48)


class LogLine(_Message):
    """The script logs a line of text."""

    kind: Literal["line"] = "line"
    text: str = Field(min_length=1, max_length=MAX_LINE)


FromSite: TypeAlias = Hello | Training | End
FromScript: TypeAlias = Answer | Value | LogLine
_FROM_SITE: Final = TypeAdapter[FromSite](Annotated[FromSite, Field(discriminator="kind")])
_FROM_SCRIPT: Final = TypeAdapter[FromScript](Annotated[FromScript, Field(discriminator="kind")])


class ScriptSocket:
    """One end of the socket. `peer` names the other end in errors."""

    def __init__(self, sock: socket.socket, *, peer: str) -> None:
        self._socket = sock
        self._peer = peer

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Two connected ends."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(self, message: FromSite | FromScript, descriptor: int | None = None) -> None:
        """Send one message, with a descriptor if given. Raises OSError if the peer is gone."""
        raw = message.model_dump_json().encode()
        if len(raw) > MAX_MESSAGE:
            raise MalformedMessage(
                f"a message of {len(raw)} bytes is over the limit of {MAX_MESSAGE}", where="script socket"
            )
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._socket.sendmsg([raw], rights)

    def receive_from_site(self) -> tuple[FromSite | None, int | None]:
        """The site's next message and its descriptor; None when the site is gone."""
        raw, descriptor = self._receive()
        return (None if raw is None else self._read(_FROM_SITE, raw, descriptor)), descriptor

    def receive_from_script(self) -> tuple[FromScript | None, int | None]:
        """The script's next message and its descriptor; None when the script is gone. Raises MalformedMessage."""
        raw, descriptor = self._receive()
        return (None if raw is None else self._read(_FROM_SCRIPT, raw, descriptor)), descriptor

    def _receive(self) -> tuple[bytes | None, int | None]:
        space = socket.CMSG_LEN(4 * array.array("i").itemsize)
        try:
            raw, ancillary, flags, _ = self._socket.recvmsg(MAX_MESSAGE + 1, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None, None
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        if len(descriptors) > 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or len(raw) > MAX_MESSAGE:
            for descriptor in descriptors:
                os.close(descriptor)
            raise MalformedMessage("a message is too long or carries too many descriptors", where=self._peer)
        if not raw and not descriptors:
            return None, None
        return raw, descriptors[0] if descriptors else None

    def _read(self, adapter: TypeAdapter[Any], raw: bytes, descriptor: int | None) -> Any:
        try:
            document = json.loads(raw)
            return adapter.validate_python(document)
        except (ValueError, RecursionError) as error:
            if descriptor is not None:
                os.close(descriptor)
            fields = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ()
            what = f"a message is malformed{' in ' + '.'.join(map(str, fields)) if fields else ''}"
            raise MalformedMessage(what, where=self._peer) from error

    def close(self) -> None:
        """Close this end; a thread that waits on it sees the peer gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
