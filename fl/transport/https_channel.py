"""Calls over HTTPS: HTTP/1.1 on as many connections as calls are under way, each to the same certificate.

`fl.server.https_server` has the requests. The frames of a call that takes a stream go up by requests of their own: one
request ends with the first frame that is no full chunk, so that a word arrives at once and a transfer is one request.
"""

from __future__ import annotations

import hmac
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from fl.errors import CallFailed, MalformedMessage, PeerLost
from fl.transport.frames import CHUNK
from fl.transport.records import LENGTH, length_of, prefix_of, read_end
from fl.transport.tls import client_context
from fl.transport.tls_stream import TlsStream

SILENCE_SECONDS: Final = 20.0
"""The one liveness rule: the server gives a sign of life every five seconds; silent for so long, it is gone."""
IDLE_SECONDS: Final = 15.0
"""A connection that was idle for so long is not used again: the server may be about to close it."""


class HttpsChannel:
    """Connections to the server with this certificate (DER). Safe to use from many threads."""

    def __init__(
        self,
        dial: Callable[[], socket.socket],
        *,
        certificate: bytes,
        host: str,
        tls_key: str,
        certificate_pem: str,
    ) -> None:
        """`host`: the DNS name in the server's certificate."""
        self._dial = dial
        self._certificate = certificate
        self._host = host
        self._context = client_context(tls_key, certificate_pem, ["http/1.1"])
        self._lock = threading.Lock()
        self._idle: list[tuple[float, _Connection]] | None = []

    def call(self, method: str, frames: Iterable[bytes], *, timeout: float | None) -> HttpsCall:
        """Call a method that takes a stream of frames."""
        return HttpsCall(self, method, iter(frames), timeout)

    def ask(self, method: str, frame: bytes, *, timeout: float | None) -> HttpsCall:
        """Call a method that takes one frame."""
        return HttpsCall(self, method, frame, timeout)

    def appraise(self, *, timeout: float) -> bytes:
        """The server's frame about itself. Raises CallFailed."""
        call = HttpsCall(self, "Appraise", None, timeout)
        try:
            frames = list(call)
        finally:
            call.cancel()
        if len(frames) != 1:
            raise CallFailed("INTERNAL", "the server says nothing of itself")
        return frames[0]

    def close(self) -> None:
        """Close idle connections; those of calls end with their calls."""
        with self._lock:
            idle, self._idle = self._idle or [], None
        for _, connection in idle:
            connection.close()

    def take(self) -> _Connection:
        """A connection, for one request at a time. Raises OSError, PeerLost."""
        while True:
            with self._lock:
                since, connection = self._idle.pop() if self._idle else (0.0, None)
            if connection is None:
                return _Connection(self._dial(), self._context, self._host, self._certificate)
            if time.monotonic() - since < IDLE_SECONDS:
                return connection
            connection.close()

    def give(self, connection: _Connection) -> None:
        """Give a connection back whose request is over."""
        if connection.sock is not None:  # the server wants it to go on
            connection.secure.settimeout(SILENCE_SECONDS)
            with self._lock:
                if self._idle is not None:
                    self._idle.append((time.monotonic(), connection))
                    return
        connection.close()


class _Connection(http.client.HTTPConnection):
    """One TLS connection, to the certificate that was appraised."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, host: str, certificate: bytes) -> None:
        super().__init__(host)
        plain.settimeout(SILENCE_SECONDS)
        if plain.family != socket.AF_UNIX:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.secure = TlsStream(plain, context, host=host)
        except BaseException:
            plain.close()
            raise
        self.sock: TlsStream | None = self.secure
        if not hmac.compare_digest(self.secure.certificate, certificate):
            self.close()
            raise PeerLost("the server shows another certificate than before", where=host)

    def connect(self) -> None:
        """A connection that has ended is not made anew."""
        raise ConnectionError("the connection has ended")

    def begin(self, path: str, headers: dict[str, str]) -> None:
        """Begin a request whose body comes in pieces."""
        self.putrequest("POST", path, skip_accept_encoding=True)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            self.putheader(name, value)
        self.endheaders()

    def piece(self, *parts: bytes) -> None:
        """A piece of the body (RFC 9112, section 7.1)."""
        self.send(b"".join((b"%x\r\n" % sum(map(len, parts)), *parts, b"\r\n")))

    def finish(self) -> None:
        """The body is whole."""
        self.send(b"0\r\n\r\n")

    def abort(self) -> None:
        """End the connection under whoever reads or writes it."""
        try:
            self.secure.abort()
        except OSError:
            return


class HttpsCall:
    """A call under way."""

    def __init__(
        self, channel: HttpsChannel, method: str, request: bytes | Iterator[bytes] | None, timeout: float | None
    ) -> None:
        self._channel = channel
        self._path = f"/v1/{method}"
        self._id = os.urandom(16).hex()
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self._over = False
        self._dropped = False
        self._failure: CallFailed | None = None
        self._connection: _Connection | None = None
        self._sending: _Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        streamed = request is not None and not isinstance(request, bytes)
        try:
            connection = self._connection = channel.take()
            connection.begin(self._path, {"Call": self._id} if streamed else {})
            if isinstance(request, bytes):
                connection.piece(prefix_of(request), request)
            connection.finish()
        except (OSError, PeerLost, http.client.HTTPException) as error:
            self._failure = CallFailed("UNAVAILABLE", str(error)[:200])
            self._drop()
            return
        if request is not None and not isinstance(request, bytes):
            threading.Thread(target=self._send, args=(request,), name="https up", daemon=True).start()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        if self._over:
            raise StopIteration
        try:
            frame = self._next()
        except CallFailed as error:
            self._failure = error
            self._drop()
            raise
        except (OSError, ValueError, MalformedMessage, http.client.HTTPException) as error:
            cut = error.what if isinstance(error, MalformedMessage) else str(error)
            late = self._deadline is not None and time.monotonic() >= self._deadline
            self._failure = CallFailed("DEADLINE_EXCEEDED" if late else "UNAVAILABLE", cut[:200])
            self._drop()
            raise self._failure from error
        if frame is None:
            raise StopIteration
        return frame

    def cancel(self) -> None:
        """End the call."""
        self._over = True
        self._opened.set()
        self._drop()

    def __del__(self) -> None:
        """Nobody reads the answer any more: the call is over, as it is with gRPC."""
        self._drop()

    def _drop(self) -> None:
        """End both connections, if the call is not over in good order."""
        connection, self._connection = self._connection, None
        with self._lock:
            self._dropped = True
            if self._sending is not None:
                self._sending.abort()  # its thread closes it
        if connection is not None:
            connection.abort()
            connection.close()

    def _next(self) -> bytes | None:
        """The next frame; None at the end in good order. Raises CallFailed and what reading raises."""
        connection = self._connection
        if connection is None:
            raise CallFailed("CANCELLED", "the call was ended")
        if self._response is None:
            self._set_timeout(connection)
            response = connection.getresponse()
            self._response = response
            if response.status != 200:
                raise CallFailed(_STATUS.get(response.status, "UNAVAILABLE"), f"HTTP status {response.status}")
            self._opened.set()
        while True:
            self._set_timeout(connection)
            size, end = length_of(_exactly(self._response, LENGTH))
            if not size:
                continue
            raw = _exactly(self._response, size)
            if not end:
                return raw
            status, details = read_end(raw)
            if status != "OK":
                raise CallFailed(status, details)
            if self._response.read(1):
                raise MalformedMessage("something follows the end of an answer", where="record")
            self._over, self._connection = True, None
            self._channel.give(connection)
            return None

    def _set_timeout(self, connection: _Connection) -> None:
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for the call is over")
        connection.secure.settimeout(min(left, SILENCE_SECONDS))

    def _send(self, frames: Iterator[bytes]) -> None:
        """Send the call's frames, on a thread of its own. A failure shows where the answer is read."""
        connection: _Connection | None = None
        try:
            for frame in frames:
                if not self._opened.wait(SILENCE_SECONDS) or self._over:
                    return
                if connection is None:
                    connection = self._taken()
                    connection.begin(f"{self._path}/{self._id}", {})
                connection.piece(prefix_of(frame), frame)
                if len(frame) < CHUNK:
                    self._finish(connection)
                    connection = None
            if not self._opened.wait(SILENCE_SECONDS) or self._over:
                return
            if connection is not None:
                self._finish(connection)
            connection = self._taken()
            connection.begin(f"{self._path}/{self._id}", {"Last": "1"})
            self._finish(connection)
            connection = None
        except (OSError, PeerLost, http.client.HTTPException):
            return
        finally:
            if connection is not None:
                connection.close()

    def _taken(self) -> _Connection:
        connection = self._channel.take()
        with self._lock:
            if not self._dropped:
                self._sending = connection
                return connection
        connection.close()
        raise ConnectionError("the call is over")

    def _finish(self, connection: _Connection) -> None:
        connection.finish()
        response = connection.getresponse()
        response.read(1)
        if response.status != 204:
            raise ConnectionError(f"HTTP status {response.status}")
        with self._lock:
            if self._dropped:
                raise ConnectionError("the call is over")
            self._sending = None
        self._channel.give(connection)


_STATUS: Final = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    408: "DEADLINE_EXCEEDED",
    503: "RESOURCE_EXHAUSTED",
}


def _exactly(response: http.client.HTTPResponse, size: int) -> bytes:
    raw = response.read(size)
    if len(raw) != size:
        raise ConnectionError("the answer was cut")
    return raw
