"""Our protocol over HTTP: /v1/… (docs/reference/broker-http.md)."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from attestation.binding import PURPOSES, device_nonce, report_data
from attestation.broker.appraisal import Bound
from attestation.broker.clock import now
from attestation.broker.exchange import BROKER, METRICS, count_client, json_response, log, read_body
from attestation.broker.service import Broker
from attestation.broker.sessions import Session, attested_session, use
from attestation.broker.stamping import PATH as TIMESTAMP_PATH
from attestation.canonical import b64, digests, unb64
from attestation.ears import MAX_EARS_SIZE
from attestation.errors import BrokerUnavailable, SessionRefused
from attestation.evidence.composite import SnpEvidence
from attestation.hybrid import PUBLIC_SIZE, seal
from attestation.jws import ed25519_public_key
from attestation.ledger.receipt import Receipt
from attestation.messages import (
    PROOF_HEADER,
    Answer,
    AttestRequest,
    CredentialRequest,
    DepositRequest,
    RecordRequest,
    ReleaseRequest,
    SessionRequest,
    TimestampRequest,
    check_proof,
    parse_message,
    proof_session,
    release_info,
    request_digest,
    sign_answer,
)
from attestation.witness.http import WATCH
from policies.charter import Charter
from policies.charter.timestamps import TIMESTAMP_LIMIT
from policies.errors import Refused, SealwrightError, Unusable

routes = web.RouteTableDef()
MAX_PAGE = 256
"""Entries in one page of the ledger."""


class Call:
    """One request under /v1, and what its answer is signed over."""

    def __init__(self, request: web.Request, body: bytes) -> None:
        self.broker: Broker = request.app[BROKER]
        self.request = request
        self.body = body
        self.proof: str | None = request.headers.get(PROOF_HEADER)
        self.digest = request_digest(body, self.proof)
        self.nonce = ""
        self._proved: dict[bytes, int] = {}

    @property
    def session(self) -> str:
        """The session that the call's proof names. Raises Unusable."""
        if self.proof is None:
            raise Unusable(f"the call has no {PROOF_HEADER} header", where=self.request.path, do="Prove your key.")
        return proof_session(self.proof)

    def authorise(self, session: Session | None) -> Session:
        """Check the proof against the session's attested key, and that its counter is new."""
        at = self.broker.clock()
        if session is not None:
            self.nonce = session.guest_nonce
        session = attested_session(session, "v1", at)
        counter = self.check(session.key("sign"))
        return use(session, "v1", at, counter=counter)

    def check(self, key: bytes) -> int:
        """Check the proof against a signing key (SPKI DER) and return its counter. Raises Refused or Unusable.

        Once for each key: the call does not change between the moments at which it is asked for.
        """
        if key in self._proved:
            return self._proved[key]
        if self.proof is None:
            raise Unusable(f"the call has no {PROOF_HEADER} header", where=self.request.path, do="Prove your key.")
        call = check_proof(
            self.proof,
            ed25519_public_key(_pem(key)),
            broker=self.broker.name,
            method=self.request.method,
            path=self.request.path,
            body=self.body,
        )
        self._proved[key] = call.counter
        return call.counter

    def done(self, result: dict[str, Any]) -> web.Response:
        """The signed answer."""
        answer = Answer(self.broker.name, self.digest, self.nonce, now(), "done", result)
        return json_response({"answer": sign_answer(answer, self.broker.following.keys.signing)})

    def refused(self, error: Refused) -> web.Response:
        """The signed refusal, with every reason."""
        self.request.app[METRICS].decision("refused")
        log("refused", path=self.request.path, where=error.where, reasons=list(error.reasons))
        answer = Answer(self.broker.name, self.digest, self.nonce, now(), "refused", {}, tuple(error.reasons))
        token = sign_answer(answer, self.broker.following.keys.signing)
        return json_response({"answer": token, "error": error_body(error)}, status=status_of(error))


def error_body(error: SealwrightError) -> dict[str, Any]:
    """An error as its JSON answer has it."""
    body: dict[str, Any] = {"what": error.what, "where": error.where, "do": error.do}
    if isinstance(error, Refused):
        body["reasons"] = list(error.reasons)
    return body


def status_of(error: SealwrightError) -> int:
    """The HTTP status of an error under /v1."""
    if isinstance(error, BrokerUnavailable):
        return 503
    if isinstance(error, SessionRefused):
        return 401
    return 403 if isinstance(error, Refused) else 400


@routes.post("/v1/sessions")
async def sessions(request: web.Request) -> web.Response:
    """Open a session: the broker's nonce for the guest's."""
    call = Call(request, await read_body(request, 4096))
    message = parse_message(SessionRequest, call.body, limit=4096)
    unb64(message.nonce, where="nonce")
    call.nonce = message.nonce
    if not count_client(request):
        return call.refused(BrokerUnavailable("this client opens sessions too fast", where="sessions"))
    try:
        session, loaded = await call.broker.open("v1", message.nonce)
    except Refused as error:
        return call.refused(error)
    charter = loaded.charter
    return call.done(
        {
            "charter": {"id": charter.id, "version": charter.version},
            "nonce": session.nonce,
            "platform": charter.consortium.platform,
            "session": session.id,
        }
    )


@routes.post("/v1/attest")
async def attest(request: web.Request) -> web.Response:
    """Appraise a guest; the answer holds its EAR."""
    call = Call(request, await read_body(request))
    message = parse_message(AttestRequest, call.body, limit=len(call.body))
    evidence = SnpEvidence(
        unb64(message.evidence.report, where="report"), unb64(message.evidence.certificates, where="certificates")
    )
    keys = {purpose: unb64(key, where=f"keys.{purpose}") for purpose, key in message.keys.items()}
    if sorted(keys) != list(PURPOSES) or len(keys["kem"]) != PUBLIC_SIZE:
        raise Unusable(f"a guest has the keys {', '.join(PURPOSES)}", where="keys", do="Send these three.")
    key_digests = digests(keys)

    def bind(session: Session, charter: Charter) -> Bound:
        call.nonce = session.guest_nonce
        here = (call.broker.name, charter.id, charter.version, unb64(session.nonce, where="session"))
        return Bound(
            report_data(*here, keys, message.devices),
            device_nonce(*here, key_digests),
            {"broker": call.broker.name, "keys": key_digests, "nonce": session.nonce},
        )

    def check(session: Session) -> tuple[str, ...]:
        try:
            if call.session != session.id:
                return ("the proof was made for another session",)
            call.check(keys["sign"])
        except SealwrightError as error:
            return (f"the proof of possession does not hold: {error.what}",)
        return ()

    try:
        affirmed = await call.broker.attest(
            message.session,
            "v1",
            evidence,
            unb64(message.init_data, where="init_data"),
            additional=message.devices,
            bind=bind,
            check=check,
            keys=dict(message.keys),
            key_digests=key_digests,
        )
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("affirmed")
    log("affirmed", session=affirmed.session.id, entry=affirmed.receipt.index)
    full = {} if affirmed.full_ear == affirmed.ear else {"full_ear": affirmed.full_ear}
    return call.done({"ear": affirmed.ear, **full, **logged(affirmed.receipt, affirmed.entry)})


@routes.post("/v1/credentials")
async def credentials(request: web.Request) -> web.Response:
    """Issue a certificate over the attested TLS key, with this broker's EAR and those that other brokers gave."""
    call = Call(request, await read_body(request, MAX_EARS_SIZE + 16384))
    message = parse_message(CredentialRequest, call.body, limit=MAX_EARS_SIZE + 16384)
    try:
        csr = unb64(message.csr, where="csr")
        issued = await call.broker.credential(call.session, csr, message.ears, call.authorise)
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("credential")
    result = {"certificate": b64(issued.certificate), "issuer": call.broker.following.keys.issuer.certificate_pem}
    return call.done({**result, **logged(issued.receipt, issued.entry)})


@routes.post("/v1/release")
async def release(request: web.Request) -> web.Response:
    """Release a resource, sealed to the attested KEM key."""
    call = Call(request, await read_body(request, 64 * 1024))
    message = parse_message(ReleaseRequest, call.body, limit=64 * 1024)

    def sealed(session: Session, value: bytes, serial: int) -> bytes:
        info = release_info(call.broker.name, message.resource, serial, call.digest)
        return seal(value, session.key("kem"), info=info)

    try:
        released = await call.broker.release(
            call.session,
            "v1",
            message.resource,
            job=message.job,
            authorise=call.authorise,
            seal=sealed,
            request=call.digest,
        )
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("released")
    log("released", resource=message.resource, session=released.session.id, entry=released.receipt.index)
    result = {"resource": message.resource, "sealed": b64(released.sealed), "serial": released.serial}
    return call.done({**result, **logged(released.receipt, released.entry)})


@routes.post("/v1/records")
async def records(request: web.Request) -> web.Response:
    """Write down what an attested guest says."""
    call = Call(request, await read_body(request, 96 * 1024))
    message = parse_message(RecordRequest, call.body, limit=96 * 1024)
    try:
        recorded = await call.broker.record(call.session, message.kind, message.document, call.authorise)
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("recorded")
    return call.done(logged(recorded.receipt, recorded.entry))


@routes.put("/v1/resources/{repository}/{type}/{tag}")
async def deposit(request: web.Request) -> web.Response:
    """Keep a resource that its owner has signed."""
    call = Call(request, await read_body(request, 256 * 1024))
    message = parse_message(DepositRequest, call.body, limit=256 * 1024)
    resource = "/".join(request.match_info[part] for part in ("repository", "type", "tag"))
    if not count_client(request):
        return call.refused(BrokerUnavailable("this client deposits too fast", where="resources"))
    try:
        content, receipt = await call.broker.deposit(
            resource, message.deposit, unb64(message.salt, where="salt"), unb64(message.value, where="value")
        )
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("deposited")
    return call.done({"resource": resource, "serial": content.serial, "receipt": receipt.to_json()})


@routes.get("/v1/time")
async def signed_time(request: web.Request) -> web.Response:
    """The time, the charter's version and the ledger's head, signed over the caller's `nonce`."""
    call = Call(request, b"")
    nonce = request.query.get("nonce", "")
    if len(unb64(nonce[:128], where="nonce")) < 16:
        raise Unusable("a nonce has at least 16 bytes", where="nonce", do="Send base64 of random bytes.")
    call.nonce = nonce
    try:
        charter = (await call.broker.following.charter(call.broker.clock())).charter
    except Refused as error:
        return call.refused(error)
    head = await call.broker.storage.look(lambda step: step.published())
    return call.done({"charter": {"id": charter.id, "version": charter.version}, "checkpoint": head.checkpoint})


@routes.get("/v1/charter")
async def charter_store(request: web.Request) -> web.Response:
    """The charter's files, which need no trust: their reader verifies them from the root."""
    broker: Broker = request.app[BROKER]
    loaded = await broker.following.charter(broker.clock())
    return web.Response(body=loaded.message, content_type="application/json")


@routes.get("/v1/charter/newest")
async def newest_store(request: web.Request) -> web.Response:
    """The files of the newest charter here, followed yet or not: its timestamp may lack other brokers' signatures."""
    message = await asyncio.to_thread(request.app[BROKER].following.charters.newest)
    return web.Response(body=message, content_type="application/json")


@routes.post(TIMESTAMP_PATH)
async def timestamp(request: web.Request) -> web.Response:
    """Another broker's timestamp of the charter: signed here as well, taken, or answered with a newer one."""
    call = Call(request, await read_body(request, 2 * TIMESTAMP_LIMIT))
    message = parse_message(TimestampRequest, call.body, limit=2 * TIMESTAMP_LIMIT)
    if not count_client(request):
        return call.refused(BrokerUnavailable("this client offers timestamps too fast", where="timestamp"))
    raw = unb64(message.timestamp, where="timestamp")
    try:
        reply = await asyncio.to_thread(call.broker.following.charters.reply, raw, call.broker.clock())
    except Refused as error:
        return call.refused(error)
    if reply.timestamp is None and WATCH in request.app:
        request.app[WATCH].hint()  # one of the two has an older charter
    return call.done({"timestamp": None if reply.timestamp is None else b64(reply.timestamp), "version": reply.version})


@routes.get("/v1/ledger/checkpoint")
async def checkpoint(request: web.Request) -> web.Response:
    """The ledger's signed head, as a C2SP signed note."""
    head = await request.app[BROKER].storage.look(lambda step: step.published())
    return web.Response(text=head.checkpoint, content_type="text/plain")


@routes.get("/v1/ledger/entries")
async def entries(request: web.Request) -> web.Response:
    """Entries [start, end), at most MAX_PAGE, base64."""
    start, end = _number(request, "start"), _number(request, "end")
    found = await request.app[BROKER].storage.look(lambda step: step.entries(start, min(end, start + MAX_PAGE)))
    return json_response({"entries": [b64(raw) for raw in found], "start": start})


@routes.get("/v1/ledger/proof")
async def proof(request: web.Request) -> web.Response:
    """`?index=I`: the receipt of an entry under the head. `?old=M`: that the head's tree extends that of size M."""
    storage = request.app[BROKER].storage
    if "index" in request.query:
        index = _number(request, "index")
        return json_response((await storage.look(lambda step: step.receipt(index, step.published()))).to_json())
    old = _number(request, "old")
    head, steps = await storage.look(lambda step: ((head := step.published()), step.consistency(old, head.size)))
    return json_response({"checkpoint": head.checkpoint, "old": old, "proof": [b64(step) for step in steps]})


def logged(receipt: Receipt, entry: bytes) -> dict[str, Any]:
    """The part of an answer that shows its ledger entry."""
    return {"entry": entry.decode("utf-8"), "receipt": receipt.to_json()}


def _number(request: web.Request, name: str) -> int:
    text = request.query.get(name, "")
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise Unusable(f"{name} is no number", where=request.path, do=f"Ask with ?{name}=NUMBER.")
    return int(text)


def _pem(spki: bytes) -> str:
    return f"-----BEGIN PUBLIC KEY-----\n{b64(spki)}\n-----END PUBLIC KEY-----\n" if len(spki) == 44 else ""
