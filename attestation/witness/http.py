"""A witness over HTTP: POST …/add-checkpoint (C2SP tlog-witness), in a broker and alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from attestation.broker.exchange import log, read_body
from attestation.ledger.witness import MAX_REQUEST
from attestation.witness.service import PREFIX, Answer, Witness

WITNESS: Final = web.AppKey("witness", Witness)
OUTDATED: Final = (403, 404)
"""Answers that a newer charter may turn into cosignatures: a ledger, or a key of it, that is not known here."""
LOOK_SECONDS: Final = 5.0
"""How often a charter is looked for because of such answers; anybody can cause them."""


class CharterWatch:
    """Looks for a newer charter when a request hints that there is one. For one event loop."""

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._looked = -LOOK_SECONDS
        self._task: asyncio.Task[None] | None = None

    def hint(self) -> None:
        """Look, unless it was done just now."""
        now = asyncio.get_running_loop().time()
        if now - self._looked >= LOOK_SECONDS and (self._task is None or self._task.done()):
            self._looked = now
            self._task = asyncio.ensure_future(self._looking())

    async def _looking(self) -> None:
        try:
            await self._look()
        except Exception as error:  # told, and looked for again at the next hint
            log("charter", problem=f"{type(error).__name__}: {error}")


WATCH: Final = web.AppKey("charter watch", CharterWatch)
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
        if answer.status in OUTDATED and WATCH in request.app:
            request.app[WATCH].hint()
    return web.Response(text=answer.body, status=answer.status, content_type=answer.content_type)
