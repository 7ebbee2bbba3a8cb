"""The client's end of a tunnel: a WebSocket through proxies that end TLS, to the server's own TLS behind them.

Programs see a plain socket. The WebSockets of a process share one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Coroutine
from typing import Any, Final

import aiohttp

TUNNEL_SECONDS: Final = 15.0
"""The proxies and the server open a tunnel within this time."""
PIECE: Final = 256 << 10


class Tunnels:
    """Opens tunnels. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[asyncio.Task[None]] = set()

    def open(self, address: str, *, protocol: str, outer: ssl.SSLContext | None, proxy: str | None) -> socket.socket:
        """A tunnel by way of `address` (host:port): what is written to it comes out at the server's TLS.

        `protocol`: which of the server's protocols; `outer`: TLS to what is at `address`, if it speaks that; `proxy`:
        an HTTP proxy before it. Raises OSError.
        """
        ours, theirs = socket.socketpair()
        try:
            self._wait(self._opened(theirs, address, protocol, outer, proxy))
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            ours.close()
            theirs.close()
            raise OSError(f"no tunnel: {error or type(error).__name__}") from error
        return ours

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="tunnels", daemon=True).start()
            loop = self._loop
        asyncio.run_coroutine_threadsafe(work, loop).result(TUNNEL_SECONDS + 5)

    async def _opened(
        self, end: socket.socket, address: str, protocol: str, outer: ssl.SSLContext | None, proxy: str | None
    ) -> None:
        session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        try:
            async with asyncio.timeout(TUNNEL_SECONDS):
                web = await session.ws_connect(
                    f"{'http' if outer is None else 'https'}://{address}/v1/tunnel/{protocol}",
                    ssl=True if outer is None else outer,
                    proxy=proxy,
                    heartbeat=10.0,
                    compress=0,
                    max_msg_size=1 << 20,
                )
            end.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=end, limit=PIECE)
        except BaseException:
            await session.close()
            raise
        task = asyncio.get_running_loop().create_task(_carry(session, web, reader, writer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)


async def _carry(
    session: aiohttp.ClientSession,
    web: aiohttp.ClientWebSocketResponse,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    async def up() -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(PIECE):
                await web.send_bytes(piece)
        await web.close()

    sender = asyncio.get_running_loop().create_task(up())
    try:
        async for message in web:
            if message.type is not aiohttp.WSMsgType.BINARY:
                break
            writer.write(message.data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        sender.cancel()
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await sender
        await web.close()
        await session.close()
