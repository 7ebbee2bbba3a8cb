"""The broker as an aiohttp application: routes, and what is done around each request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

from aiohttp import web

from attestation.broker import http_cold_start, http_kbs, http_v1, http_vaults
from attestation.broker.exchange import (
    BROKER,
    LIMITS,
    MAX_BODY,
    METRICS,
    REQUEST_ID,
    ClientLimits,
    TooLarge,
    TooSlow,
    json_response,
    log,
)
from attestation.broker.metrics import Metrics
from attestation.broker.service import Broker
from attestation.witness.http import WITNESS
from attestation.witness.http import routes as witness_routes
from policies.errors import SealwrightError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
REQUEST_SECONDS = 60.0
"""How long a request may take in all."""


def make_app(broker: Broker, *, client_rate: float = 200.0, client_burst: int = 1000) -> web.Application:
    """The application of `broker`. `client_rate` and `client_burst` bound the sessions that one address opens."""
    app = web.Application(middlewares=[around], client_max_size=MAX_BODY)
    app[BROKER] = broker
    app[METRICS] = Metrics()
    app[LIMITS] = ClientLimits(client_rate, client_burst)
    app.add_routes(http_v1.routes)
    app.add_routes(http_vaults.routes)
    app.add_routes(http_cold_start.routes)
    app.add_routes(http_kbs.routes)
    app.add_routes(witness_routes)
    if broker.witness is not None:
        app[WITNESS] = broker.witness
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/metrics", metrics)
    return app


@web.middleware
async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id, bound its time, turn errors into answers, count and log it."""
    identifier = secrets.token_hex(8)
    REQUEST_ID.set(identifier)
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            response = await handler(request)
    except SealwrightError as error:
        response = _error(request, error)
    except TimeoutError:
        response = _failure(request, 503, f"the request took more than {REQUEST_SECONDS:.0f} s")
    except web.HTTPException as error:
        response = _failure(request, error.status, error.reason)
    except Exception as error:  # a fault of ours: the caller hears that there is one, the log what it is
        log("fault", path=request.path, error=f"{type(error).__name__}: {error}")
        response = _failure(request, 500, "the broker has a fault; its log tells more")
    seconds = loop.time() - start
    resource = request.match_info.route.resource
    request.app[METRICS].request(resource.canonical if resource else "other", response.status, seconds)
    log("request", method=request.method, path=request.path, status=response.status, ms=round(seconds * 1000, 1))
    response.headers["Seal-Request"] = identifier
    return response


async def healthz(request: web.Request) -> web.Response:
    """Alive if it answers; ready (200) if there is a charter that holds and database and KEK answer, else 503."""
    broker = request.app[BROKER]
    problems = []
    try:
        await broker.following.charter(broker.clock())
    except SealwrightError as error:
        problems.append(error.what)
    try:
        await broker.storage.look(lambda step: step.head())
    except SealwrightError as error:
        problems.append(error.what)
    kek = await asyncio.to_thread(broker.keks.probe)
    if kek is not None:
        problems.append(kek)
    if broker.storage.cosigner.problem:
        problems.append(broker.storage.cosigner.problem)
    warnings = [broker.following.charters.problem] if broker.following.charters.problem and not problems else []
    state = {"alive": True, "ready": not problems, "problems": problems, "warnings": warnings}
    return json_response(state, status=503 if problems else 200)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus's text format."""
    broker = request.app[BROKER]
    head, published, under = await broker.storage.look(
        lambda step: (step.head(), step.published(), step.count_by_kek())
    )
    gauges = {
        "ledger_entries": float(head.size),
        "ledger_published_entries": float(published.size),
        "resources": float(sum(under.values())),
        "resources_under_old_keks": float(sum(under.values()) - under.get(broker.keks.key_id, 0)),
    }
    return web.Response(text=request.app[METRICS].text(gauges), content_type="text/plain")


def _error(request: web.Request, error: SealwrightError) -> web.Response:
    if request.path.startswith("/kbs/"):
        log("refused", path=request.path, where=error.where, what=error.what)
        request.app[METRICS].decision("refused")
        return http_kbs.kbs_refusal(error)
    status = 413 if isinstance(error, TooLarge) else 408 if isinstance(error, TooSlow) else http_v1.status_of(error)
    return json_response({"error": http_v1.error_body(error)}, status=status)


def _failure(request: web.Request, status: int, what: str) -> web.Response:
    if request.path.startswith("/kbs/"):
        return http_kbs.kbs_error("Failure", what, status=404 if status == 404 else 401)
    body = {"what": what, "where": request.path, "do": "See docs/reference/broker-http.md."}
    return json_response({"error": body}, status=status)
