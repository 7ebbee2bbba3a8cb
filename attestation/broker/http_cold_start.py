"""A cold start over HTTP: what a locked broker asks its members' custodians, and their answers (cold_start)."""

from __future__ import annotations

import asyncio

from aiohttp import web

from attestation.broker.cold_start import MAX_REQUEST, read_answer
from attestation.broker.exchange import METRICS, count_client, log, read_body
from attestation.broker.http_v1 import Call
from attestation.broker.journal import append, cold_start
from attestation.broker.peer_kek import PeerKek
from attestation.broker.service import Broker
from attestation.errors import BrokerUnavailable
from attestation.messages import Message, parse_message
from policies.errors import Refused

routes = web.RouteTableDef()
PATH = "/v1/cold-start"


class ColdStartAnswer(Message):
    """POST /v1/cold-start: a custodian's answer (JWS)."""

    answer: str


@routes.get(PATH)
async def asked(request: web.Request) -> web.Response:
    """What custodians are asked."""
    call = Call(request, b"")
    if not count_client(request):
        return call.refused(BrokerUnavailable("this client asks too fast", where="cold start"))
    try:
        charter = (await call.broker.following.charter(call.broker.clock())).charter
        wanted = await asyncio.to_thread(_kek(call.broker).request, charter)
    except Refused as error:
        return call.refused(error)
    return call.done({"request": wanted.model_dump(mode="json")})


@routes.post(PATH)
async def answered(request: web.Request) -> web.Response:
    """Take a custodian's answer; says how many more are needed."""
    call = Call(request, await read_body(request, MAX_REQUEST))
    message = parse_message(ColdStartAnswer, call.body, limit=MAX_REQUEST)
    if not count_client(request):
        return call.refused(BrokerUnavailable("this client answers too fast", where="cold start"))
    try:
        at = call.broker.clock()
        charter, kek = (await call.broker.following.charter(at)).charter, _kek(call.broker)
        asked = await asyncio.to_thread(kek.request, charter)
        answer = read_answer(message.answer, asked, charter)
        note = cold_start(answer, message.answer, asked, charter, at)
        await call.broker.storage.transact(lambda step: append(step, note))  # written down before it is of any use
        left = await asyncio.to_thread(kek.take, answer, asked)
    except Refused as error:
        return call.refused(error)
    request.app[METRICS].decision("cold-start")
    log("cold-start", needed=left, in_use=call.broker.keks.key_id)
    return call.done({"needed": left})


def _kek(broker: Broker) -> PeerKek:
    """The broker's keys that lie with peers. Raises Refused if its keys are elsewhere."""
    for kek in broker.keks.members:
        if isinstance(kek, PeerKek):
            return kek
    raise Refused("this broker's keys do not lie with peers", where="cold start", do="Start it with its own key.")
