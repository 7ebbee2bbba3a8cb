"""Connections that a port hands over (`fl.transport.port`), taken into a server of this process that terminates TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Final
from weakref import WeakSet

from aiohttp import web

HANDSHAKE_SECONDS: Final = 10.0
"""How long a handshake may take."""
CLOSE_SECONDS: Final = 1.0


class Reception:
    """Made in the loop of its server. `take` from any thread, `close` in the loop."""

    def __init__(self, server: web.Server, tls: ssl.SSLContext, *, most: int) -> None:
        """`most` connections at the same time; more are closed."""
        self._server = server
        self._tls = tls
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._greeting: set[asyncio.Task[None]] = set()
        """Handshakes that are not over."""
        self._connections: WeakSet[socket.socket] = WeakSet()
        self._closed = False

    def take(self, connection: socket.socket) -> None:
        """Serve a connection that has said hello. Never waits. Raises OSError when the server is over."""
        if self._closed or self._loop.is_closed():
            raise ConnectionAbortedError("the server stops")
        self._loop.call_soon_threadsafe(self._taken, connection)

    def _taken(self, connection: socket.socket) -> None:
        if self._closed or len(self._server.connections) + len(self._greeting) >= self._most:
            connection.close()
            return
        self._connections.add(connection)
        task = asyncio.ensure_future(self._greet(connection))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._server,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=CLOSE_SECONDS,
            )
        except OSError:  # TLS and its time limit included: nobody is there to be told
            connection.close()

    async def close(self) -> None:
        """End every connection, those of open requests after CLOSE_SECONDS."""
        self._closed = True
        self._server.pre_shutdown()
        await asyncio.sleep(0)
        await self._server.shutdown(CLOSE_SECONDS)
        for connection in list(self._connections):  # handshakes too: a loop with open ones cannot be closed
            with contextlib.suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)
        if self._greeting:
            await asyncio.wait(self._greeting, timeout=CLOSE_SECONDS)
        await asyncio.sleep(0.1)  # for what the ends of connections have still to call
