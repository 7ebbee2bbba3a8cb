"""The CoCo Key Broker protocol 0.4.0 over HTTP: /kbs/v0/{auth,attest,resource}, for stock guest components.

As the protocol has it: cookie session, nonce, evidence bound by the JCS of the runtime data, resource as a JWE to the
key in it, errors as `{"type", "detail"}` with 401 or 404. Where it leaves room, the stricter choice: a nonce is
consumed by its first use, right or wrong; init-data is demanded and must be enrolled; the `sample` TEE is refused;
there is no admin half, since the charter is the admin. What it cannot do: it names no broker, so evidence could be
relayed between two brokers that share a nonce; its answers are not signed. So a resource's owner must open it to this
way.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import sha256
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field, StringConstraints

from attestation.binding import kbs_device_nonce, kbs_report_data, tee_key_digest
from attestation.broker.appraisal import Bound
from attestation.broker.exchange import BROKER, METRICS, count_client, json_response, log, read_body
from attestation.broker.jwe import encrypt_jwe, load_tee_key
from attestation.broker.sessions import Session, attested_session
from attestation.canonical import b64
from attestation.ear import verify_ear
from attestation.errors import BrokerUnavailable, MalformedEvidence, SessionRefused
from attestation.evidence.composite import MAX_ADDITIONAL, SnpEvidence
from attestation.evidence.guest_components_json import parse_guest_components
from attestation.messages import Message, parse_message
from policies.charter import Charter
from policies.documents import RESOURCE_PATTERN
from policies.errors import Refused, SealwrightError, Unusable

routes = web.RouteTableDef()
COOKIE = "kbs-session-id"
RECEIPT_HEADER = "Seal-Receipt"
VERSION = "0.4.0"
ERRORS = "https://github.com/confidential-containers/kbs/errors/"
_RESOURCE = re.compile(RESOURCE_PATTERN)

Text = Annotated[str, StringConstraints(max_length=64 * 1024)]


class KbsRequest(Message):
    """POST /auth."""

    version: Annotated[str, StringConstraints(max_length=32)]
    tee: Annotated[str, StringConstraints(max_length=64)]
    extra_params: Annotated[Any, Field(alias="extra-params")] = ""


class KbsInitData(Message):
    """The init-data document that HOST_DATA is the digest of."""

    format: Literal["toml"]
    body: Text


class KbsRuntimeData(Message):
    """What REPORT_DATA binds."""

    nonce: Annotated[str, StringConstraints(max_length=128)]
    tee_pubkey: Annotated[dict[str, Any], Field(alias="tee-pubkey", max_length=16)]


class KbsEvidence(Message):
    """The primary device's evidence, and (as JSON text) that of others."""

    primary_evidence: dict[str, Any]
    additional_evidence: Annotated[str, StringConstraints(max_length=MAX_ADDITIONAL)] = ""


class KbsAttestation(Message):
    """POST /attest."""

    init_data: Annotated[KbsInitData | None, Field(alias="init-data")] = None
    runtime_data: Annotated[KbsRuntimeData, Field(alias="runtime-data")]
    tee_evidence: Annotated[KbsEvidence, Field(alias="tee-evidence")]


def kbs_error(name: str, detail: str, *, status: int = 401) -> web.Response:
    """An error as the protocol's clients parse it."""
    return json_response({"type": ERRORS + name, "detail": detail}, status=status)


def kbs_refusal(error: SealwrightError) -> web.Response:
    """A refusal or an unusable request as the protocol's error, every reason in its detail."""
    reasons = error.reasons if isinstance(error, Refused) else (error.what,)
    return kbs_error(type(error).__name__, "; ".join(reasons))


@routes.post("/kbs/v0/auth")
async def auth(request: web.Request) -> web.Response:
    """A nonce and a session for whoever asks."""
    broker = request.app[BROKER]
    message = parse_message(KbsRequest, await read_body(request, 16384), limit=16384)
    if message.version != VERSION:
        return kbs_error("ProtocolVersion", f"the protocol's version here is {VERSION}, not {message.version}")
    if message.tee != "snp":
        return kbs_error("UnsupportedTee", f"the TEE here is snp, not {message.tee}")
    if not count_client(request):
        return kbs_refusal(BrokerUnavailable("this client opens sessions too fast", where="sessions"))
    session, _ = await broker.open("kbs", "")
    expires = format_datetime(datetime.fromtimestamp(session.expires, UTC), usegmt=True)
    cookie = f"{COOKIE}={session.id}; Path=/kbs/v0; Expires={expires}; Secure; HttpOnly"
    return json_response({"nonce": session.nonce, "extra-params": ""}, headers={"Set-Cookie": cookie})


@routes.post("/kbs/v0/attest")
async def attest(request: web.Request) -> web.Response:
    """Appraise evidence; the answer is an EAR as a token."""
    broker = request.app[BROKER]
    message = parse_message(KbsAttestation, await read_body(request), limit=512 * 1024)
    runtime, primary = message.runtime_data, message.tee_evidence
    against: list[str] = []
    try:
        load_tee_key(runtime.tee_pubkey)
        evidence = parse_guest_components(primary.primary_evidence)
    except (MalformedEvidence, Unusable) as error:
        against.append(error.what)
        evidence = SnpEvidence(b"", b"")
    more = primary.additional_evidence
    claims = {"additional-evidence": "", "nonce": runtime.nonce, "tee-pubkey": runtime.tee_pubkey}
    if more:  # the text itself, some ten thousand letters a device, would make the token too large for a header
        del claims["additional-evidence"]
        claims["additional-evidence-sha256"] = sha256(more.encode("utf-8", "surrogatepass")).hexdigest()

    def bind(session: Session, _charter: Charter) -> Bound:
        key = runtime.tee_pubkey
        return Bound(kbs_report_data(session.nonce, key, more), kbs_device_nonce(session.nonce, key), claims)

    def check(session: Session) -> tuple[str, ...]:
        wrong = () if runtime.nonce == session.nonce else ("the runtime data's nonce is not the session's",)
        return (*wrong, *against)

    affirmed = await broker.attest(
        request.cookies.get(COOKIE, ""),
        "kbs",
        evidence,
        message.init_data.body.encode("utf-8") if message.init_data is not None else None,
        additional=more,
        bind=bind,
        check=check,
        keys={},
        key_digests={"tee": tee_key_digest(runtime.tee_pubkey)},
        tee_pubkey=dict(runtime.tee_pubkey),
        runtime=claims,
    )
    request.app[METRICS].decision("affirmed")
    log("affirmed", session=affirmed.session.id, entry=affirmed.receipt.index)
    return json_response({"token": affirmed.ear})


@routes.get("/kbs/v0/resource/{repository}/{type}/{tag}")
async def resource(request: web.Request) -> web.Response:
    """A resource as a JWE to the attested TEE key; its receipt in a header."""
    broker = request.app[BROKER]
    name = "/".join(request.match_info[part] for part in ("repository", "type", "tag"))
    if not _RESOURCE.fullmatch(name):
        return kbs_error("ResourceNotFound", f"{name[:200]} is no resource's name", status=404)
    identifier, token = await _caller(request)

    def authorise(session: Session | None) -> Session:
        found = attested_session(session, "kbs", broker.clock())
        if token is not None and found.ear != token:
            raise SessionRefused(("the token is not its session's",))
        return found

    def seal(session: Session, value: bytes, _serial: int) -> dict[str, str]:
        return encrypt_jwe(value, load_tee_key(session.tee_pubkey or {}))

    released = await broker.release(
        identifier, "kbs", name, job=None, authorise=authorise, seal=seal, request=identifier
    )
    request.app[METRICS].decision("released")
    log("released", resource=name, session=released.session.id, entry=released.receipt.index)
    receipt = b64(released.receipt.to_bytes())
    return json_response(released.sealed, headers={RECEIPT_HEADER: receipt})


async def _caller(request: web.Request) -> tuple[str, str | None]:
    """The session of a cookie, or of a bearer token (which then must be the session's own)."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if not scheme:
        return request.cookies.get(COOKIE, ""), None
    if scheme.lower() != "bearer":
        raise Unusable("the Authorization header is no bearer token", where="request", do="Send Bearer TOKEN.")
    broker = request.app[BROKER]
    at = broker.clock()
    ear = verify_ear(token.strip(), (await broker.following.charter(at)).charter, at)
    return ear.document.nonce, token.strip()
