"""The server's calls over HTTPS (HTTP/1.1, aiohttp): it takes connections, and listens on a UNIX socket for tunnels.

    POST /v1/METHOD          a call: for one that takes one frame, that frame; for the others nothing
    POST /v1/METHOD/CALL     further frames of a call that takes a stream, which names itself by 32 hex digits
                             (the header Call of its opening request); from the same certificate
    GET  /v1/tunnel/PROTOCOL a WebSocket to this server's own TLS, for those who come by proxies that end theirs

Bodies are records (`fl.transport.records`). No request waits for another's body, so that any HTTP/1.1 proxy on the way
may read a request whole before it passes it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import uvloop
from aiohttp import WSMsgType, web

from fl.errors import MalformedMessage
from fl.server import calls
from fl.server.calls import CallerGone, Refusal, Service, subject_of
from fl.server.certificates import ServerCertificates, TlsContexts
from fl.transport.reception import CLOSE_SECONDS, HANDSHAKE_SECONDS, Reception
from fl.transport.records import LENGTH, SIGN_OF_LIFE, end_record, length_of, prefix_of

MAX_CALLS: Final = 512
"""Calls that are served at the same time; more are refused."""
MAX_CONNECTIONS: Final = 2048
MAX_TUNNELS: Final = 256
IDLE_SECONDS: Final = 30.0
"""A connection on which no whole request comes for so long is closed: its first, or one after another."""
LIFE_SECONDS: Final = 5.0
"""After so long without a frame an answer gets a sign of life."""
AHEAD: Final = 4
"""Frames that wait between a call and its connection, in each direction."""
TUNNEL_PIECE: Final = 256 << 10
_STRANGER: Final = "a client certificate is needed here"


_log = logging.getLogger("fl.https")
_unsaid = logging.getLogger("fl.https.callers")
_unsaid.setLevel(logging.CRITICAL + 1)  # aiohttp quotes there what a caller has sent


class HttpsServer:
    """A running server. `close` ends it."""

    def __init__(
        self,
        service: Service,
        certificates: ServerCertificates,
        path: str,
        *,
        tunnels: Mapping[str, str],
        plain_path: str | None = None,
    ) -> None:
        """Serve what is handed over by `take`, and on the UNIX socket `path`.

        `tunnels`: the UNIX socket of each protocol to which a tunnel may lead; with any, clients without a certificate
        are let in, to the tunnels alone. `plain_path`: a second socket, without TLS, for tunnels alone.
        """
        self._service = service
        self._certificates = certificates
        self._tunnels = dict(tunnels)
        self._pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="https call")
        self._calls: dict[tuple[bytes, str], _Caller] = {}
        self._active = 0
        self._open_tunnels = 0
        self._loop = uvloop.new_event_loop()
        self._reception: Reception | None = None
        self._listeners: list[asyncio.AbstractServer] = []
        self._thread = threading.Thread(target=self._run, name="https", daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(self._start(path, plain_path), self._loop)
        started.result(10)

    def take(self, connection: socket.socket) -> None:
        """Serve a connection that has said hello. From any thread; never waits. Raises OSError when it is over."""
        if self._reception is None:
            raise ConnectionAbortedError("the server stops")
        self._reception.take(connection)

    def close(self) -> None:
        """End it and every connection."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _start(self, path: str, plain_path: str | None) -> None:
        server = web.Server(
            self._handled,
            handler_cancellation=True,
            keepalive_timeout=IDLE_SECONDS,
            tcp_keepalive=False,
            access_log=None,
            logger=_unsaid,
            lingering_time=0.5,
            read_bufsize=1 << 20,
            auto_decompress=False,
        )
        context = TlsContexts(self._certificates, strangers=bool(self._tunnels)).switching()
        self._reception = Reception(server, context, most=MAX_CONNECTIONS)
        self._listeners.append(
            await self._loop.create_unix_server(
                server,
                path,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=CLOSE_SECONDS,
                backlog=256,
            )
        )
        if plain_path is not None:
            self._listeners.append(await self._loop.create_unix_server(server, plain_path, backlog=256))

    async def _stop(self) -> None:
        for listener in self._listeners:
            listener.close()
        for caller in list(self._calls.values()):
            caller.cancel()
        if self._reception is not None:
            await self._reception.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _handled(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._handle(request)
        except (ConnectionError, web.HTTPException):
            raise
        except Exception:
            _log.exception("a request failed")
            raise

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        parts = request.path.split("/")[1:]
        if parts[0] != "v1" or request.query_string or len(parts) not in (2, 3):
            return web.Response(status=404)
        if request.method == "GET" and parts[1] == "tunnel" and len(parts) == 3:
            return await self._tunnel(request, parts[2])
        if request.method != "POST":
            return web.Response(status=405)
        certificate = _certificate_of(request)
        if certificate is None:
            return web.Response(status=403, text=_STRANGER)
        name = parts[1]
        try:
            if len(parts) == 3:
                return await self._further(request, certificate, parts[2])
            if name == "Appraise":
                return await self._appraise(request)
            if name in self._service.asked:
                return await self._ask(request, certificate, name)
            if name in self._service.streamed:
                return await self._open(request, certificate, name)
        except (MalformedMessage, asyncio.IncompleteReadError):
            return web.Response(status=400)
        except TimeoutError:
            return web.Response(status=408)
        return web.Response(status=404)

    async def _appraise(self, request: web.BaseRequest) -> web.StreamResponse:
        async for _ in _records(request):
            raise MalformedMessage("this call takes no frame", where="call")
        try:
            frame = self._service.appraise()
        except Refusal as refusal:
            return web.Response(body=end_record(refusal.status, refusal.details))
        return web.Response(body=prefix_of(frame) + frame + end_record("OK", ""))

    async def _ask(self, request: web.BaseRequest, certificate: bytes, name: str) -> web.StreamResponse:
        frames = [frame async for frame in _records(request, most=1)]
        if len(frames) != 1:
            raise MalformedMessage("this call takes one frame", where="call")
        return await self._answer(request, name, frames[0], _Caller(self._loop, request, certificate))

    async def _open(self, request: web.BaseRequest, certificate: bytes, name: str) -> web.StreamResponse:
        async for _ in _records(request):
            raise MalformedMessage("frames of this call come later", where="call")
        call = request.headers.get("Call", "")
        if len(call) != 32 or not set(call) <= set("0123456789abcdef") or (certificate, call) in self._calls:
            raise MalformedMessage("the call does not name itself", where="call")
        caller = self._calls[certificate, call] = _Caller(self._loop, request, certificate)
        try:
            return await self._answer(request, name, caller.frames(), caller)
        finally:
            del self._calls[certificate, call]

    async def _further(self, request: web.BaseRequest, certificate: bytes, call: str) -> web.StreamResponse:
        caller = self._calls.get((certificate, call))
        if caller is None or not caller.begin_sending():
            return _closing(410)
        try:
            async for frame in _records(request):
                if not await caller.take(frame):
                    return _closing(410)
            if request.headers.get("Last") == "1":
                caller.half_close()
        except BaseException:
            caller.break_off()
            raise
        finally:
            caller.end_sending()
        return web.Response(status=204)

    async def _answer(
        self, request: web.BaseRequest, name: str, frames: Iterator[bytes] | bytes, caller: _Caller
    ) -> web.StreamResponse:
        if self._active >= MAX_CALLS:
            return _closing(503)
        self._active += 1
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "Cache-Control": "no-store"})
        response.enable_chunked_encoding()
        work = self._pool.submit(self._produce, name, frames, caller)
        try:
            await response.prepare(request)
            await response.write(SIGN_OF_LIFE)
            async for piece in caller.answer():
                await response.write(piece)
            await response.write_eof()
        finally:
            caller.end()
            self._active -= 1
            work.add_done_callback(_seen)
        return response

    def _produce(self, name: str, frames: Iterator[bytes] | bytes, caller: _Caller) -> None:
        """Answer a call, on a thread of its own."""
        end = end_record("UNKNOWN", "")
        answer = self._service.answer(name, frames, caller)
        try:
            with contextlib.closing(answer):  # type: ignore[type-var]  # it is a generator
                for frame in answer:
                    if not caller.put(prefix_of(frame), frame):
                        return
            end = end_record("OK", "")
        except Refusal as refusal:
            end = end_record(refusal.status, refusal.details)
        except CallerGone:
            end = end_record("CANCELLED", "")
        finally:
            caller.put(end, last=True)

    # --- tunnels ------------------------------------------------------------------------------------------------------

    async def _tunnel(self, request: web.BaseRequest, protocol: str) -> web.StreamResponse:
        """Tie a WebSocket to this server's own TLS: whoever comes this way proves itself there, inside."""
        path = self._tunnels.get(protocol)
        if path is None:
            return web.Response(status=403, text="connection_security is mtls at this server: it has no tunnels")
        if self._open_tunnels >= MAX_TUNNELS:
            return _closing(503)
        socket = web.WebSocketResponse(heartbeat=10.0, compress=False, max_msg_size=1 << 20, timeout=1.0)
        if not socket.can_prepare(request):
            return web.Response(status=426)
        self._open_tunnels += 1
        try:
            await socket.prepare(request)
            reader, writer = await asyncio.open_unix_connection(path, limit=TUNNEL_PIECE)
            back = self._loop.create_task(_from_stream(reader, socket))
            try:
                async for message in socket:
                    if message.type is not WSMsgType.BINARY:
                        break
                    writer.write(message.data)
                    await writer.drain()
            finally:
                back.cancel()
                writer.close()
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await back
        except ConnectionError:
            return socket
        finally:
            self._open_tunnels -= 1
        return socket


async def _from_stream(reader: asyncio.StreamReader, socket: web.WebSocketResponse) -> None:
    while piece := await reader.read(TUNNEL_PIECE):
        await socket.send_bytes(piece)
    await socket.close()


async def _records(request: web.BaseRequest, *, most: int | None = None) -> AsyncIterator[bytes]:
    """The frames of a request's body; each comes within STALL_SECONDS. Raises MalformedMessage, TimeoutError."""
    count = 0
    while True:
        async with asyncio.timeout(calls.STALL_SECONDS):
            try:
                head = await request.content.readexactly(LENGTH)
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise
                return
            size, end = length_of(head)
            frame = await request.content.readexactly(size)
        count += 1
        if end or not size or (most is not None and count > most):
            raise MalformedMessage("a request's body is no list of frames", where="call")
        yield frame


def _certificate_of(request: web.BaseRequest) -> bytes | None:
    secure = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    certificate: bytes | None = None if secure is None else secure.getpeercert(binary_form=True)
    return certificate


def _closing(status: int) -> web.Response:
    """An answer after which the connection is closed, whatever of the request is still to come."""
    response = web.Response(status=status)
    response.force_close()
    return response


def _seen(work: Future[None]) -> None:
    """Look at what a call's thread ended with: a fault of ours is to be seen."""
    if not work.cancelled() and (error := work.exception()) is not None:
        _log.error("a call failed", exc_info=error)


class _Caller:
    """The caller of one call, between the thread that answers it and the loop that has its connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: web.BaseRequest, certificate: bytes) -> None:
        self._loop = loop
        self._transport = request.transport
        self._certificate = certificate
        self._over = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(AHEAD)  # for frames that come
        self._sending = False
        self._half_closed = False
        self._answer: deque[tuple[tuple[bytes, ...], bool]] = deque()
        self._space = threading.Semaphore(AHEAD)  # for frames that go
        self._news = asyncio.Event()

    # what the service sees, on any thread

    @property
    def certificate(self) -> bytes:
        return self._certificate

    @property
    def who(self) -> str:
        return f"{subject_of(self._certificate)} over HTTPS"

    def cancel(self) -> None:
        self.end()
        if self._transport is not None:
            with contextlib.suppress(RuntimeError):  # the loop is over
                self._loop.call_soon_threadsafe(self._transport.abort)

    def active(self) -> bool:
        return not self._over.is_set()

    def when_over(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if not self._over.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def frames(self) -> Iterator[bytes]:
        """The frames that come, until the caller ends them. Raises CallerGone when the call is over before that."""
        while True:
            frame = self._received.get()
            if frame is None:
                if self._half_closed:
                    return
                raise CallerGone
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._room.release)
            yield frame

    def put(self, *pieces: bytes, last: bool = False) -> bool:
        """Add to the answer, when there is room; False if the call is over."""
        if not last:
            self._space.acquire()
        if self._over.is_set():
            self._space.release()
            return False
        self._answer.append((pieces, last))
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.set)
        return True

    # what the loop sees

    def begin_sending(self) -> bool:
        """Whether a request may bring frames now: one at a time, while the call is not over."""
        if self._sending or self._half_closed or self._over.is_set():
            return False
        self._sending = True
        return True

    def end_sending(self) -> None:
        self._sending = False

    async def take(self, frame: bytes) -> bool:
        """Take a frame when there is room; False if the call is over."""
        await self._room.acquire()
        self._received.put(frame)
        return not self._over.is_set()

    def break_off(self) -> None:
        """No frame comes any more, and that was not the end."""
        self._received.put(None)

    def half_close(self) -> None:
        """The caller has sent its last frame."""
        self._half_closed = True
        self._received.put(None)

    async def answer(self) -> AsyncIterator[bytes]:
        """What is to be written, as it comes; a sign of life when nothing does."""
        while True:
            while self._answer:
                pieces, last = self._answer.popleft()
                for piece in pieces:
                    yield piece
                self._space.release()
                if last:
                    return
            if self._over.is_set():
                return
            self._news.clear()
            if self._answer:
                continue
            try:
                async with asyncio.timeout(LIFE_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                yield SIGN_OF_LIFE

    def end(self) -> None:
        """The call is over: whatever waits for its caller, or has to be told, is."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            callbacks, self._callbacks = self._callbacks, []
        self._received.put(None)
        self._space.release(AHEAD)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._news.set)
            self._loop.call_soon_threadsafe(self._room.release)
        for callback in callbacks:
            callback()
