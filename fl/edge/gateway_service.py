"""A gateway's HTTP service (HTTP/1.1 over TLS 1.3, aiohttp): the routes' bounds, and waiting for news.

What is sealed is decided by `fl.edge.gateway`; what is not sealed verifies itself. So TLS may end before the gateway,
and no status but those in sealed answers says anything of a device.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web

from attestation.canonical import b64
from attestation.errors import LeaseEnded
from fl.edge.gateway import Gateway
from fl.edge.messages import ProofRequest, TaskRequest, read_words
from fl.edge.protocol import MESSAGES, Message
from fl.edge.routes import JSON, PREFIX, ROUTES, SEALED, Name
from fl.edge.sealing import KeyGone
from fl.edge.uploads import PieceRefused, Uploads
from fl.errors import MalformedMessage
from fl.transport.port import Port
from fl.transport.reception import Reception
from policies.charter import Charter
from policies.errors import Refused

MAX_CONNECTIONS: Final = 4096
MAX_BODIES: Final = 64 << 20
"""Bytes of request bodies that are read at the same time; one body may always be."""
MAX_UPLOADS: Final = 128 << 20
"""Bytes of pieces that are held."""
MAX_WAITING: Final = 4096
"""Requests for a task that wait at the same time; others are answered at once."""
BODY_SECONDS: Final = 60.0
IDLE_SECONDS: Final = 75.0
BUSY_SECONDS: Final = 5

_log = logging.getLogger("fl.edge")
_unsaid = logging.getLogger("fl.edge.callers")
_unsaid.setLevel(logging.CRITICAL + 1)  # aiohttp quotes there what a caller has sent
_HEX32: Final = re.compile(r"[0-9a-f]{64}")
_NUMBER: Final = re.compile(r"[0-9]{1,12}")
_RANGE: Final = re.compile(r"bytes=([0-9]{1,12})-([0-9]{1,12})?")
_PATHS: Final[Mapping[str, Mapping[str, Name]]] = {
    path: {route.method: route.name for route in ROUTES if route.path == path} for path in {r.path for r in ROUTES}
}

CharterStore = Callable[[], tuple[Charter, Mapping[str, bytes]]]
"""The charter that the guest follows, and the files of its store."""


class GatewayService:
    """A running service. All but `news` is for the loop in which it was started."""

    def __init__(
        self,
        gateway: Gateway,
        store: CharterStore,
        tls: ssl.SSLContext,
        tell: Callable[[str], None] = lambda _: None,
        *,
        share: int = 1,
    ) -> None:
        """`tell` takes lines for the guest's log. So many services `share` the gateway's bounds."""
        self._gateway = gateway
        self._store = store
        self._tls = tls
        self._tell = tell
        self._uploads = Uploads(MAX_UPLOADS // share)
        self._most_bodies = MAX_BODIES // share
        self._most_connections = MAX_CONNECTIONS // share
        self._bodies = 0
        self._waiting = 0
        self._changed = asyncio.Event()
        self._charter: tuple[Mapping[str, bytes] | None, bytes] = (None, b"")
        self._handlers: Mapping[Name, Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]] = {
            "charter": self._give_charter,
            "proof": self._prove,
            "blob": self._give_blob,
            "message": self._answer,
            "offset": self._offset,
            "upload": self._upload,
        }
        self._reception: Reception | None = None
        self._port: Port | None = None
        self.address = ""
        """Where it listens."""

    async def start(self, listen: str) -> None:
        """Listen on `listen` (host:port; port 0 takes a free one). Raises PeerLost if the address cannot be had.

        What a stranger may make wait before it has said hello is bounded by the port, as at every server of ours.
        """
        self.open()
        self._port = Port(listen, {"https": self.take}, tell=self._tell)
        self.address = self._port.address

    def open(self) -> None:
        """Be ready to `take` connections, in the running loop."""
        server = web.Server(
            self._handled,
            handler_cancellation=True,
            keepalive_timeout=IDLE_SECONDS,
            access_log=None,
            logger=_unsaid,
            lingering_time=0.5,
            read_bufsize=1 << 18,
            auto_decompress=False,
        )
        self._reception = Reception(server, self._tls, most=self._most_connections)

    def take(self, connection: socket.socket) -> None:
        """Serve a connection that has said hello. From any thread; never waits. Raises OSError when it is over."""
        if self._reception is None:
            raise ConnectionAbortedError("the gateway stops")
        self._reception.take(connection)

    async def stop(self) -> None:
        """End it and every connection."""
        self.news()
        if self._port is not None:
            await asyncio.to_thread(self._port.close)
        if self._reception is not None:
            await self._reception.close()

    def news(self) -> None:
        """There is a new version, or a job is over: whoever waits for a task is answered."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _handled(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._route(request)
        except ConnectionError:
            raise
        except LeaseEnded:
            return _error(503, "the gateway has no lease now")
        except KeyGone:
            return _error(410, "the group key is gone: ask for the proof again")
        except _Unread as error:
            return _closing(_error(error.status, str(error)))
        except (MalformedMessage, Refused) as error:
            return _closing(_error(400, error.what))
        except (TimeoutError, asyncio.IncompleteReadError):
            return _closing(_error(400, "the body did not come whole"))
        except Exception:
            _log.exception("a request failed")
            return _error(503, "the gateway failed")

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if not path.startswith(PREFIX):
            return _error(404, "there is nothing here")
        path = path.removeprefix(PREFIX)
        head, _, last = path.rpartition("/")
        if _HEX32.fullmatch(last):
            path, last = f"{head}/{{id}}", last
        found = _PATHS.get(path, {}).get(request.method)
        if found is None:
            return _error(404, "there is nothing here")
        return await self._handlers[found](request, last)

    async def _give_charter(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        charter, files = self._store()
        if request.query.get("above") == str(charter.version):
            return web.Response(status=204)
        if self._charter[0] is not files:
            told = {"files": {name: b64(raw) for name, raw in sorted(files.items())}}
            self._charter = (files, json.dumps(told).encode())
        return web.Response(body=self._charter[1], content_type=JSON)

    async def _prove(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        asked = read_words(ProofRequest, await self._body(request, 1024), where="proof")
        return web.Response(text=self._gateway.proof(asked.nonce), content_type=JSON)

    async def _give_blob(self, request: web.BaseRequest, identifier: str) -> web.StreamResponse:
        content = self._gateway.blob(identifier)
        if content is None:
            return _error(404, "there is no such blob now: ask for the task again")
        headers = {"Cache-Control": "public, max-age=86400, immutable", "Accept-Ranges": "bytes"}
        wanted = request.headers.get("Range")
        if wanted is None:
            return web.Response(body=content, content_type=SEALED, headers=headers)
        found = _RANGE.fullmatch(wanted)
        first = int(found[1]) if found else len(content)
        last = min(int(found[2]) if found and found[2] else len(content), len(content) - 1)
        if not first <= last:
            return _error(416, "there is no such range")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        piece = memoryview(content)[first : last + 1]
        return web.Response(status=206, body=bytes(piece), content_type=SEALED, headers=headers)

    async def _answer(self, request: web.BaseRequest, last: str) -> web.StreamResponse:
        if last not in MESSAGES:
            raise AssertionError(last)
        body = await self._body(request, self._gateway.most())
        return _sealed(await self._answered(last, body))

    async def _answered(self, message: Message, body: bytes) -> bytes:
        call = self._gateway.opened(message, body)
        if isinstance(call, bytes):
            return call
        try:
            answer = self._gateway.decide(call)
            wait = call.request.wait_seconds if isinstance(call.request, TaskRequest) else 0.0
            ends = time.monotonic() + wait
            while answer.status in ("RETRY", "NO_TASK") and time.monotonic() < ends and self._waiting < MAX_WAITING:
                await self._news(ends)
                answer = self._gateway.decide(call)
        except Exception:
            _log.exception("a message failed")
            answer = self._gateway.failed(call)
        return self._gateway.sealed(call, answer)

    async def _news(self, ends: float) -> None:
        """Wait for news, at most until `ends`."""
        self._waiting += 1
        try:
            async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            return
        finally:
            self._waiting -= 1

    async def _offset(self, request: web.BaseRequest, digest: str) -> web.StreamResponse:
        ticket = self._gateway.ticket(request.headers.get("Upload-Ticket", ""))
        if ticket is None:
            return _error(404, "the ticket is none")
        return web.json_response({"offset": self._uploads.offset(ticket, digest)})

    async def _upload(self, request: web.BaseRequest, digest: str) -> web.StreamResponse:
        ticket = self._gateway.ticket(request.headers.get("Upload-Ticket", ""))
        if ticket is None:
            raise _Unread(404, "the ticket is none")
        numbers = [request.headers.get(name, "") for name in ("Upload-Offset", "Upload-Length")]
        if not all(map(_NUMBER.fullmatch, numbers)):
            raise MalformedMessage("an upload needs Upload-Offset and Upload-Length", where="upload")
        offset, length = map(int, numbers)
        most = self._gateway.most()
        if length > most:
            raise _Unread(413, f"a result has at most {most} bytes")
        piece = await self._body(request, length)
        try:
            whole = self._uploads.put(ticket, digest, length, offset, piece, time.monotonic())
        except PieceRefused as error:
            if error.offset is None:
                raise MalformedMessage(str(error), where="upload") from error
            return web.json_response({"offset": error.offset, "error": {"what": str(error)}}, status=409)
        if isinstance(whole, int):
            return web.json_response({"offset": whole}, status=202)
        return _sealed(await self._answered("result", whole))

    async def _body(self, request: web.BaseRequest, most: int) -> bytes:
        """The body, which has to name its length. Raises MalformedMessage, TimeoutError, _Unread."""
        length = request.content_length
        if length is None or length < 1:
            raise MalformedMessage("a body has to name its length", where="request")
        if length > most:
            raise _Unread(413, f"the body has {length} bytes, more than {most}")
        if self._bodies and self._bodies + length > self._most_bodies:
            raise _Unread(503, "too many requests are read at the moment")
        self._bodies += length
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await request.content.readexactly(length)
        finally:
            self._bodies -= length


class _Unread(Exception):
    """A request that is answered without reading its body."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


def _sealed(body: bytes) -> web.Response:
    return web.Response(body=body, content_type=SEALED, headers={"Cache-Control": "no-store"})


def _error(status: int, what: str) -> web.Response:
    headers = {"Cache-Control": "no-store"} | ({"Retry-After": str(BUSY_SECONDS)} if status == 503 else {})
    return web.json_response({"error": {"what": what}}, status=status, headers=headers)


def _closing(response: web.Response) -> web.Response:
    """An answer after which the connection is closed, whatever of the request is still to come."""
    response.force_close()
    return response
