"""Job records: what a user asks to be run, where, and for whom, in one signed document (DESIGN.md section 5, Run)."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from attestation.jws import sign_jws
from fl.errors import MalformedMessage
from fl.jobs.settings import Digest, Name

RECORD_TYPE: Final = "sealwright-job+jwt"
UserName: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}/[a-z0-9][a-z0-9._-]{0,62}$")
]
"""`MEMBER/USER`."""
JobId: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,95}$")]
Time: TypeAlias = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


class JobRecord(BaseModel):
    """What the submitter signs. `model_sha256` is the content address of the first model, in clear."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    charter: Digest
    job: JobId
    name: Name
    bundle: Digest
    server: Name
    roster: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000, strict=False)]
    recipients: Annotated[tuple[UserName, ...], Field(min_length=1, max_length=64, strict=False)]
    rounds: int = Field(ge=1)
    min_sites: int = Field(ge=1)
    model_sha256: Digest
    model_size: int = Field(ge=1, le=1 << 40)
    created: Time
    submitter: UserName

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if len(set(self.roster)) != len(self.roster) or len(set(self.recipients)) != len(self.recipients):
            raise ValueError("the roster or the recipients name someone twice")
        if self.min_sites > len(self.roster):
            raise ValueError(f"min_sites is {self.min_sites}, the roster has {len(self.roster)}")
        return self

    @property
    def created_at(self) -> datetime:
        """When the submitter signed it, by its own clock."""
        return datetime.fromisoformat(self.created)


def sign_record(record: JobRecord, key: Ed25519PrivateKey) -> str:
    """The record as a token, signed by its submitter's key."""
    return sign_jws(record.model_dump(mode="json"), key, kid=record.submitter, typ=RECORD_TYPE)


def record_digest(token: str) -> str:
    """What a ledger entry or a statement calls a job record: the SHA-256 of its token."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse_record(payload: dict[str, Any]) -> JobRecord:
    """Check a record's payload, whose signature holds, by its model. Raises MalformedMessage."""
    try:
        return JobRecord.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "record"
        raise MalformedMessage(f"the job record is wrong at {place}: {first['msg']}", where="job record") from error
