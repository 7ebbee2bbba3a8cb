"""What guests, owners and brokers say to each other under /v1: the requests' models, proofs of possession, answers.

Every guest call after the session's opening carries a *proof* (header `Seal-Proof`): a JWS by the guest's attested
signing key over method, path, body, session, broker and a counter that only grows. Every answer is a JWS by the broker
over the digest of what was asked, the nonce that the guest chose for the session, the time, and the result or every
reason against it. docs/reference/broker-http.md has the whole exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attestation.canonical import canonical_bytes, format_time, parse_time, read_json_object
from attestation.ears import MAX_EAR, MAX_EARS
from attestation.errors import AnswerRefused
from attestation.evidence.composite import MAX_ADDITIONAL
from attestation.jws import read_jws, read_jws_header, sign_jws
from policies.charter.timestamps import TIMESTAMP_LIMIT
from policies.documents import Digest, Name, Resource
from policies.errors import Refused, Unusable

PROOF_HEADER: Final = "Seal-Proof"
PROOF_TYPE: Final = "seal-proof+jws"
ANSWER_TYPE: Final = "seal-answer+jws"
DEPOSIT_TYPE: Final = "seal-deposit+jws"
MAX_SECRET: Final = 64 * 1024
"""Bytes of the largest resource."""

Base64 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=512 * 1024)]
SessionId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Counter = Annotated[int, Field(ge=1, lt=2**53)]


class Message(BaseModel):
    """A document from outside: strict, frozen, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SessionRequest(Message):
    """POST /v1/sessions: `nonce` is the guest's own, base64 of 32 bytes."""

    nonce: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]


class EvidenceMessage(Message):
    """An SNP report and its certificate table (may be empty), base64."""

    report: Base64
    certificates: Base64


class AttestRequest(Message):
    """POST /v1/attest: evidence, the init-data's bytes, and the guest's public keys by purpose.

    `devices`: the evidence of GPUs and switches as text, `{"nvidia": {"device_evidence_list": […]}}`, empty for none.
    """

    session: SessionId
    evidence: EvidenceMessage
    init_data: Base64
    keys: Annotated[dict[Name, Base64], Field(max_length=8)]
    devices: Annotated[str, StringConstraints(max_length=MAX_ADDITIONAL)] = ""


class CredentialRequest(Message):
    """POST /v1/credentials: a PKCS#10 request in DER, base64, signed by the attested TLS key; other brokers' EARs."""

    csr: Base64
    ears: Annotated[list[Annotated[str, StringConstraints(max_length=MAX_EAR)]], Field(max_length=MAX_EARS - 1)] = []


class ReleaseRequest(Message):
    """POST /v1/release: the resource, and the job for which it is wanted (None: for none)."""

    resource: Resource
    job: dict[str, Any] | None = None


class RecordRequest(Message):
    """POST /v1/records: what an attested guest has written down."""

    kind: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
    document: dict[str, Any]


class Deposit(Message):
    """What an owner signs to deposit a resource at one broker. `serial` grows with each deposit of a resource.

    `generation` is 0, and not written, for a whole value, else that of the share that is deposited (attestation.split).
    The ledger keeps this for all to read, so the value is not in it, only a commitment: `value_commitment`.
    """

    broker: Name
    charter: Digest
    commitment: Digest
    resource: Resource
    serial: Counter
    time: Annotated[str, StringConstraints(max_length=20)]
    generation: Annotated[int, Field(ge=0, lt=2**31)] = 0


class DepositRequest(Message):
    """PUT /v1/resources/R/T/T: the deposit signed by the owner's member key (JWS), the value, the commitment's salt."""

    deposit: Annotated[str, StringConstraints(max_length=8192)]
    salt: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$")]
    value: Base64


class TimestampRequest(Message):
    """POST /v1/timestamp: a timestamp of the charter that another broker offers, base64."""

    timestamp: Annotated[
        str, StringConstraints(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=4 * TIMESTAMP_LIMIT // 3 + 4)
    ]


M = TypeVar("M", bound=Message)


def parse_message(kind: type[M], raw: bytes, *, limit: int) -> M:
    """Read a request's body of at most `limit` bytes. Raises Unusable, without repeating the values."""
    return check_message(kind, read_json_object(raw, where=kind.__name__, limit=limit))


def check_message(kind: type[M], value: dict[str, Any]) -> M:
    """Check JSON values against a message's model. Raises Unusable, without repeating the values."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        complaints = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
            for item in error.errors(include_url=False, include_context=False, include_input=False)[:5]
        )
        raise Unusable(
            f"this is no {kind.__name__}: {complaints}", where=kind.__name__, do="See docs/reference/broker-http.md."
        ) from error


@dataclass(frozen=True, slots=True)
class Call:
    """One call under /v1 as its proof binds it. `body` is the bytes that are sent."""

    broker: str
    method: str
    path: str
    body: bytes
    session: str
    counter: int

    def payload(self) -> dict[str, Any]:
        """What the proof signs."""
        return {
            "body": sha256(self.body).hexdigest(),
            "broker": self.broker,
            "counter": self.counter,
            "method": self.method,
            "path": self.path,
            "session": self.session,
        }


def sign_proof(call: Call, key: Ed25519PrivateKey) -> str:
    """The proof of possession for a call."""
    return sign_jws(call.payload(), key, kid=call.session, typ=PROOF_TYPE)


def proof_session(proof: str) -> str:
    """The session that a proof names, before it is checked. Raises Unusable."""
    return read_jws_header(proof, typ=PROOF_TYPE)


def check_proof(proof: str, key: Ed25519PublicKey, *, broker: str, method: str, path: str, body: bytes) -> Call:
    """Check a proof against the call that was received. Raises Refused or Unusable; the counter is the caller's."""
    payload = read_jws(proof, key, typ=PROOF_TYPE)
    counter = payload.get("counter")
    if type(counter) is not int or not 1 <= counter < 2**53:
        raise Unusable("the proof has no counter", where="proof", do="Count calls from 1.")
    call = Call(broker, method, path, body, proof_session(proof), counter)
    if payload != call.payload():
        raise Refused(
            "the proof was made for another call, body, session or broker",
            where="proof",
            do="Sign each call by itself.",
        )
    return call


def request_digest(body: bytes, proof: str | None) -> str:
    """What an answer names as the question: SHA-256 (hex) of the proof, which binds the body, or of the body alone."""
    return sha256(proof.encode() if proof is not None else body).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """A broker's word on one request. `result` if `status` is done, `reasons` if it is refused."""

    broker: str
    request: str
    nonce: str
    time: datetime
    status: Literal["done", "refused"]
    result: dict[str, Any]
    reasons: tuple[str, ...] = ()


def sign_answer(answer: Answer, key: Ed25519PrivateKey) -> str:
    """Sign an answer as its broker."""
    payload = {
        "broker": answer.broker,
        "nonce": answer.nonce,
        "reasons": list(answer.reasons),
        "request": answer.request,
        "result": answer.result,
        "status": answer.status,
        "time": format_time(answer.time),
    }
    return sign_jws(payload, key, kid=answer.broker, typ=ANSWER_TYPE)


def read_answer(token: str, key: Ed25519PublicKey, *, broker: str, request: str, nonce: str) -> Answer:
    """Check that `token` is this broker's answer to this very request. Raises AnswerRefused or Unusable.

    A refusal may have no nonce: a broker that does not know the session does not know the guest's nonce either.
    """
    try:
        payload = read_jws(token, key, typ=ANSWER_TYPE)
    except Refused as error:
        raise AnswerRefused((f"the answer is not signed by broker {broker}",)) from error
    status = payload.get("status")
    reasons = [
        f"the answer is about another {word}"
        for word, expected in (("broker", broker), ("request", request), ("nonce", nonce))
        if payload.get(word) != expected and (word, payload.get("nonce"), status) != ("nonce", "", "refused")
    ]
    if reasons:
        raise AnswerRefused(tuple(reasons))
    result, why, time = (payload.get(word) for word in ("result", "reasons", "time"))
    if status not in ("done", "refused") or not isinstance(result, dict) or not isinstance(time, str):
        raise Unusable("this is no broker's answer", where="answer", do="Check the broker's version.")
    if not isinstance(why, list) or not all(isinstance(reason, str) for reason in why):
        raise Unusable("this is no broker's answer", where="answer", do="Check the broker's version.")
    return Answer(broker, request, nonce, parse_time(time, where="answer"), status, result, tuple(why))


def value_commitment(salt: bytes, value: bytes) -> str:
    """What stands for a deposited value in public: SHA-256 (hex) of a context, 32 secret random bytes and the value."""
    return sha256(b"sealwright-deposit-v1\0" + salt + value).hexdigest()


def not_deposited(resource: str) -> str:
    """The reason by which a broker says that it does not hold a resource, so that its guest asks another."""
    return f"{resource} was not deposited at this broker"


def release_info(broker: str, resource: str, serial: int, request: str) -> bytes:
    """The HPKE `info` of a released resource: it opens as the answer to this request and as nothing else."""
    return b"sealwright-release-v1\0" + canonical_bytes(
        {"broker": broker, "request": request, "resource": resource, "serial": serial}
    )
