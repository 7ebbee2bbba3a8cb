"""Commands: what a user tells a server about jobs, each signed with the user's own key.

TLS proves to the server who speaks. The signature is for everybody else: a site to which a command comes by way of the
server, and whoever reads the ledger later.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attestation.jws import sign_jws
from fl.errors import MalformedMessage
from fl.jobs.progress import Line
from fl.jobs.record import JobId, Time, UserName
from fl.jobs.settings import Digest, Name

COMMAND_TYPE: Final = "sealwright-command+jwt"
MAX_COMMAND: Final = 8 << 10
"""Characters of the longest command."""
SignedVerb = Literal[
    "abort", "delete", "clone", "download", "list", "report", "watch", "approve", "reject", "restart", "stop"
]
"""All commands but `submit`, whose signature is the job record's."""


class UserCommand(BaseModel):
    """What the user signs: about one `job`, or about one `place` (`restart`, `stop`: a site or the server itself), or
    about neither (`list`). `nonce` makes each command one of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    charter: Digest
    server: Name
    command: SignedVerb
    job: JobId | None
    place: Name | None = None
    user: UserName
    created: Time
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    why: Annotated[Line, Field(max_length=500)] = ""

    @property
    def created_at(self) -> datetime:
        """When the user signed it, by its own clock."""
        return datetime.fromisoformat(self.created)


def sign_command(command: UserCommand, key: Ed25519PrivateKey) -> str:
    """The command as a token, signed by its user's key."""
    return sign_jws(command.model_dump(mode="json"), key, kid=command.user, typ=COMMAND_TYPE)


def parse_command(payload: dict[str, Any]) -> UserCommand:
    """Check a command's payload, whose signature holds, by its model. Raises MalformedMessage."""
    try:
        command = UserCommand.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "command"
        raise MalformedMessage(f"the command is wrong at {place}: {first['msg']}", where="command") from error
    about_place = command.command in {"restart", "stop"}
    if (command.place is not None) != about_place:
        raise MalformedMessage("`restart` and `stop` are about one site or server, and no other is", where="command")
    if (command.job is None) != (about_place or command.command == "list"):
        raise MalformedMessage("every command but `list`, `restart` and `stop` is about one job", where="command")
    return command
