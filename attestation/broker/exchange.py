"""What every request has in common: bounded bodies, identifiers, limits by client, errors as answers, JSON logs."""

from __future__ import annotations

import asyncio
import contextvars
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

from attestation.broker.metrics import Metrics
from attestation.broker.service import Broker
from policies.errors import Unusable

BROKER: Final = web.AppKey("broker", Broker)
METRICS: Final = web.AppKey("metrics", Metrics)
MAX_BODY: Final = 512 * 1024
"""Bytes of the largest body that any route reads."""
BODY_SECONDS: Final = 15.0
"""How long a body may take to arrive."""
REQUEST_ID: Final = contextvars.ContextVar("request_id", default="-")


def log(event: str, **fields: Any) -> None:
    """Write one line of JSON to standard error. No secret is ever a field; a request's lines share its id."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, "request": REQUEST_ID.get()}
    sys.stderr.write(json.dumps({**line, **fields}, ensure_ascii=False, default=str) + "\n")
    sys.stderr.flush()


class TooLarge(Unusable):
    """A body beyond its bound."""


class TooSlow(Unusable):
    """A body that did not arrive in time."""


async def read_body(request: web.Request, limit: int = MAX_BODY) -> bytes:
    """The request's body, at most `limit` bytes, within BODY_SECONDS. Raises TooLarge or TooSlow."""
    do = f"Send at most {limit} bytes."
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge(f"the body has {request.content_length} bytes, more than {limit}", where=request.path, do=do)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Unusable("bodies are not compressed here", where=request.path, do="Send it as it is.")
    parts = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_any():
                parts += chunk
                if len(parts) > limit:
                    raise TooLarge(f"the body has more than {limit} bytes", where=request.path, do=do)
    except TimeoutError as error:
        raise TooSlow(
            f"the body took more than {BODY_SECONDS:.0f} s", where=request.path, do="Send it faster."
        ) from error
    return bytes(parts)


def json_response(
    value: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer that nobody may keep."""
    return web.Response(
        body=json.dumps(value, ensure_ascii=False).encode("utf-8"),
        status=status,
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


class ClientLimits:
    """A token bucket for each client address: `rate` a second, `burst` at once; the longest idle are forgotten."""

    def __init__(self, rate: float, burst: int, clients: int = 10_000) -> None:
        self._rate = rate
        self._burst = burst
        self._clients = clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, client: str, at: float) -> bool:
        """Take one token of this client at the time `at` (monotonic seconds), if it has one."""
        tokens, since = self._buckets.pop(client, (float(self._burst), at))
        tokens = min(self._burst, tokens + (at - since) * self._rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, at)
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return allowed


LIMITS: Final = web.AppKey("limits", ClientLimits)


def count_client(request: web.Request) -> bool:
    """Whether this client may open one more session now."""
    return request.app[LIMITS].allows(request.remote or "", asyncio.get_running_loop().time())
