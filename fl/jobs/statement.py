"""Statements: an attested server's signed word that this model came of this job (DESIGN.md section 5, Result).

The statement is a JWS by the server's attested signing key. Its reader needs the server's EARs beside it, which k
brokers of the charter signed and which name that key: so the word is worth what the appraisals are worth, and nobody
can put another model, bundle or roster in its place.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, unb64
from attestation.ear import SKEW
from attestation.ears import MAX_EAR, MAX_EARS, verify_ears
from attestation.identity import enrolment_reasons
from attestation.jws import read_jws, sign_jws
from fl.errors import StatementRefused
from fl.jobs.record import JobId, JobRecord, Time, UserName
from fl.jobs.settings import Digest, Name
from policies.errors import Refused, SealwrightError

if TYPE_CHECKING:
    from policies.charter import Charter

STATEMENT_TYPE: Final = "sealwright-result+jwt"


class Statement(BaseModel):
    """What the server says about a result. `result_sha256` is that of the sealed bytes that recipients get."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    charter: Digest
    job: JobId
    name: Name
    record_sha256: Digest
    bundle: Digest
    server: Name
    roster: Annotated[tuple[Name, ...], Field(strict=False)]
    contributors: Annotated[tuple[Name, ...], Field(strict=False)]
    """The sites whose updates are in the last global model."""
    rounds: int
    first_model_sha256: Digest
    model_sha256: Digest
    result_sha256: Digest
    recipients: Annotated[tuple[UserName, ...], Field(strict=False)]
    started: Time
    finished: Time


class SignedStatement(BaseModel):
    """A statement with what its reader needs to believe it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    statement: Annotated[str, Field(max_length=256 * 1024)]
    sign_key: Annotated[str, Field(max_length=128)]
    """The server's signing key: SubjectPublicKeyInfo in DER, base64."""
    ears: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_EAR)], ...], Field(min_length=1, max_length=MAX_EARS, strict=False)
    ]
    """The server's EARs, current when the statement was signed."""


def sign_statement(statement: Statement, key: Ed25519PrivateKey, ears: tuple[str, ...]) -> SignedStatement:
    """Sign as the server that `ears` are about."""
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    token = sign_jws(statement.model_dump(mode="json"), key, kid=f"server/{statement.server}", typ=STATEMENT_TYPE)
    return SignedStatement(statement=token, sign_key=b64(public), ears=ears)


def verify_statement(signed: SignedStatement, record: JobRecord, charter: Charter, at: datetime) -> Statement:
    """The statement, if an attested server of `charter` made it about the job of `record` before `at`.

    The EARs have to be good, and enough, at the time that the statement gives as its own. Raises StatementRefused with
    every reason.
    """
    try:
        der = unb64(signed.sign_key, where="statement")
        key = load_der_public_key(der)
        if not isinstance(key, Ed25519PublicKey):
            raise StatementRefused(record.job, ("its key is not Ed25519",))
        statement = Statement.model_validate(read_jws(signed.statement, key, typ=STATEMENT_TYPE))
        ear = verify_ears(signed.ears, charter, datetime.fromisoformat(statement.finished))[0]
    except ValidationError as error:
        raise StatementRefused(record.job, (f"it is malformed: {error.errors()[0]['msg']}",)) from error
    except Refused as error:
        raise StatementRefused(record.job, error.reasons) from error
    except (SealwrightError, ValueError, UnsupportedAlgorithm) as error:
        what = error.what if isinstance(error, SealwrightError) else "its key is unreadable"
        raise StatementRefused(record.job, (what,)) from error
    reasons = [*enrolment_reasons(ear, charter), *_differences(statement, record)]
    if not hmac.compare_digest(ear.keys.get("sign", ""), sha256(der).hexdigest()):
        reasons.append("its key is not the one that the server's EARs name")
    if (ear.subject.role, ear.subject.name) != ("server", record.server):
        reasons.append(f"it was made by {ear.subject.role}/{ear.subject.name}, not by server/{record.server}")
    if datetime.fromisoformat(statement.finished) > at + SKEW:
        reasons.append("it is from the future")
    if reasons:
        raise StatementRefused(record.job, tuple(reasons))
    return statement


def _differences(statement: Statement, record: JobRecord) -> Iterator[str]:
    wanted = {
        "charter": record.charter,
        "job": record.job,
        "name": record.name,
        "bundle": record.bundle,
        "server": record.server,
        "roster": record.roster,
        "rounds": record.rounds,
        "first_model_sha256": record.model_sha256,
        "recipients": record.recipients,
    }
    for field, value in wanted.items():
        if getattr(statement, field) != value:
            yield f"its {field} is not the job record's"
    if not set(statement.contributors) <= set(record.roster) or len(statement.contributors) < record.min_sites:
        yield "its contributors are not enough sites of the roster"
