"""A witness over HTTP: POST …/add-checkpoint (C2SP tlog-witness), in a broker and alone."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from attestation.broker.exchange import log, read_body
from attestation.ledger.witness import MAX_REQUEST
from attestation.witness.service import PREFIX, Answer, Witness

WITNESS: Final = web.AppKey("witness", Witness)
routes = web.RouteTableDef()


@routes.post(f"{PREFIX}/add-checkpoint")
async def add_checkpoint(request: web.Request) -> web.Response:
    """Cosign a checkpoint of another member's ledger, if it extends what was cosigned before."""
    raw = await read_body(request, MAX_REQUEST)
    witness = request.app.get(WITNESS)
    if witness is None:
        answer = Answer(404, "there is no witness here\n")
    else:
        answer = await asyncio.to_thread(witness.add_checkpoint, raw)
    if answer.problem is not None:
        log("not cosigned", status=answer.status, reason=answer.problem)
    return web.Response(text=answer.body, status=answer.status, content_type=answer.content_type)
