"""Vaults over HTTP: /v1/vaults/… (docs/reference/broker-http.md, "Vaults")."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from attestation.broker import vault_calls
from attestation.broker.exchange import METRICS, log, read_body
from attestation.broker.http_v1 import Call, logged
from attestation.broker.sessions import Session
from attestation.canonical import b64, unb64
from attestation.hybrid import seal
from attestation.messages import parse_message, release_info
from attestation.vault_messages import MAX_VAULT_REQUEST, VaultDeposit, VaultLook, VaultMark, VaultOpening
from policies.errors import Refused

routes = web.RouteTableDef()


@routes.post("/v1/vaults/look")
async def look(request: web.Request) -> web.Response:
    """What this broker knows of a vault, and the key to which a share of its key is sealed."""
    call = Call(request, await read_body(request, MAX_VAULT_REQUEST))
    message = parse_message(VaultLook, call.body, limit=MAX_VAULT_REQUEST)
    try:
        state = await vault_calls.look(call.broker, call.session, message.vault, call.authorise)
    except Refused as error:
        return call.refused(error)
    kem = vault_calls.kem_key(call.broker).public_bytes()
    return call.done({"kem": b64(kem), "state": state.to_json(), "vault": message.vault})


@routes.post("/v1/vaults/deposit")
async def deposit(request: web.Request) -> web.Response:
    """Keep a share of a vault's key, which its guest has made."""
    call = Call(request, await read_body(request, MAX_VAULT_REQUEST))
    message = parse_message(VaultDeposit, call.body, limit=MAX_VAULT_REQUEST)
    sealed = unb64(message.sealed, where="sealed")
    try:
        done = await vault_calls.deposit(
            call.broker, call.session, message.vault, message.epoch, message.deal, sealed, call.authorise
        )
    except Refused as error:
        return call.refused(error)
    return _done(call, message.vault, "deposit", done)


@routes.post("/v1/vaults/open")
async def open_vault(request: web.Request) -> web.Response:
    """Release a vault's key, or this broker's share of it, to the boot that holds the vault from then on."""
    call = Call(request, await read_body(request, MAX_VAULT_REQUEST))
    message = parse_message(VaultOpening, call.body, limit=MAX_VAULT_REQUEST)

    def sealed(session: Session, value: bytes, serial: int) -> bytes:
        info = release_info(call.broker.name, message.vault, serial, call.digest)
        return seal(value, session.key("kem"), info=info)

    try:
        released = await call.broker.release(
            call.session,
            "v1",
            message.vault,
            job=None,
            authorise=call.authorise,
            seal=sealed,
            request=call.digest,
            epoch=message.epoch,
        )
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("released")
    log("released", resource=message.vault, session=released.session.id, entry=released.receipt.index)
    state = None if released.state is None else released.state.to_json()
    result: dict[str, Any] = {"resource": message.vault, "sealed": b64(released.sealed), "serial": released.serial}
    return call.done({**result, "state": state, **logged(released.receipt, released.entry)})


@routes.post("/v1/vaults/{step:prepare|commit}")
async def mark(request: web.Request) -> web.Response:
    """Prepare or commit the next store of a vault."""
    call = Call(request, await read_body(request, MAX_VAULT_REQUEST))
    message = parse_message(VaultMark, call.body, limit=MAX_VAULT_REQUEST)
    step = request.match_info["step"]
    try:
        asked = vault_calls.marked(message.vault, step, message.mark)
        done = await vault_calls.mark(call.broker, call.session, asked, call.authorise)
    except Refused as error:
        return call.refused(error)
    return _done(call, message.vault, step, done)


def _done(call: Call, vault: str, step: str, done: vault_calls.Done) -> web.Response:
    call.request.app[METRICS].decision("vault")
    log("vault", vault=vault, step=step, generation=done.state.committed.generation, entry=done.receipt.index)
    return call.done({"state": done.state.to_json(), "vault": vault, **logged(done.receipt, done.entry)})
