"""One TCP port for several protocols: a connection is accepted, its first bytes are looked at, and it is handed on.

A ClientHello is read with MSG_PEEK, so that it stays where it is; by the protocol that it offers (ALPN) the connection
is then tied to the UNIX socket on which that protocol's server terminates TLS, and the kernel moves the bytes
(splice(2)): they never enter this process's memory. A server that takes connections itself is handed the socket
instead. Nothing here decides who a peer is.

Everything a stranger can make wait is bounded in time and number. A connection that has said what it wants lives as
long as both ends do: the kernel's keep-alive closes one whose peer is gone without a word.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Final

from fl.errors import MalformedMessage, PeerLost
from fl.transport.client_hello import MAX_HELLO, TLS_1_3, needed, read_client_hello

HELLO_SECONDS: Final = 10.0
"""A connection says what it wants within this time, or is closed."""
HALF_OPEN_SECONDS: Final = 30.0
"""A connection of which one side has ended, and on which nothing moves for so long, is closed."""
GONE_SECONDS: Final = 20
"""A peer whose machine acknowledges nothing for so long is gone."""
MAX_WAITING: Final = 256
"""Connections that have not said yet what they want; the oldest go first."""
MAX_WAITING_EACH: Final = 64
"""The same from one address; more are closed at once."""
MAX_CONNECTIONS: Final = 2048
_DESCRIPTORS_EACH: Final = 6
_SPARE_DESCRIPTORS: Final = 256
_PIPE: Final = 1 << 20
_TURNS: Final = 16
"""How often bytes are moved for one connection before another has its turn."""
_TOLD_SECONDS: Final = 10.0
_EDGES: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_SPLICE: Final = 1 | 2  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK

Protocol = str
"""`grpc`, `https`, or `plain` (what does not begin with TLS)."""


def protocol_of(head: bytes) -> Protocol | None:
    """What a connection that begins with `head` wants; None if more has to come first.

    gRPC offers h2 alone; whoever offers http/1.1, or nothing, gets HTTPS. Raises MalformedMessage for a hello that is
    none, and for one without TLS 1.3.
    """
    if head and head[0] in _HTTP_METHODS:
        return "plain"
    if len(head) < needed(head):
        return None
    hello = read_client_hello(head)
    if TLS_1_3 not in hello.versions:
        raise MalformedMessage("the client does not speak TLS 1.3", where="hello")
    if not hello.protocols or b"http/1.1" in hello.protocols:
        return "https"
    if b"h2" in hello.protocols:
        return "grpc"
    raise MalformedMessage("the client speaks neither HTTP/2 nor HTTP/1.1", where="hello")


_HTTP_METHODS: Final = frozenset(b"GPHO")  # GET, POST, PUT, PATCH, HEAD, OPTIONS: the first letter


Server = str | Callable[[socket.socket], None]
"""A protocol's server: the path of its UNIX socket, or what takes a connection, and bounds and ends it from then on. It
is called in the port's thread, must not wait, and may raise OSError if it cannot have one more."""


class Port:
    """A listening address and the servers behind it. `close` ends it and every connection."""

    def __init__(
        self,
        listen: str,
        servers: Mapping[Protocol, Server],
        *,
        tell: Callable[[str], None],
        hello_seconds: float = HELLO_SECONDS,
    ) -> None:
        """Listen on `listen` (host:port; port 0 takes a free one), with each protocol's server.

        Raises PeerLost if the address cannot be had.
        """
        host, _, port = listen.rpartition(":")
        self._host = host.strip("[]")
        try:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.create_server((self._host, int(port)), family=family, backlog=256)
        except (OSError, ValueError, OverflowError) as error:
            raise PeerLost(f"the server cannot listen on {listen}: {error}", where="address") from error
        self._listener.setblocking(False)
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        """Where it listens."""
        self._servers = dict(servers)
        self._hello_seconds = hello_seconds
        self._told = _Told(tell)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, min(MAX_CONNECTIONS, (soft - _SPARE_DESCRIPTORS) // _DESCRIPTORS_EACH))
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._open: dict[int, _Spliced] = {}
        """By both of its sockets' descriptors."""
        self._ready: deque[_Spliced] = deque()
        self._epoll = select.epoll()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the port and every connection."""
        self._wake.send(b"x")
        self._thread.join(10)
        self._wake.close()

    def _run(self) -> None:
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._woken, select.EPOLLIN)
        swept = time.monotonic()
        try:
            while True:
                for descriptor, _ in self._epoll.poll(0 if self._ready else min(1.0, self._hello_seconds / 4)):
                    if descriptor == self._woken.fileno():
                        return
                    if descriptor == self._listener.fileno():
                        self._accept()
                    elif (waiting := self._waiting.get(descriptor)) is not None:
                        self._look(waiting)
                    elif (spliced := self._open.get(descriptor)) is not None:
                        self._queue(spliced)
                for _ in range(len(self._ready)):
                    self._move(self._ready.popleft())
                if (now := time.monotonic()) - swept >= min(1.0, self._hello_seconds / 4):
                    swept = now
                    self._sweep(now)
        finally:
            self._listener.close()
            self._woken.close()
            for waiting in list(self._waiting.values()):
                waiting.client.close()
            for spliced in set(self._open.values()):
                spliced.close()
            self._epoll.close()

    # --- what has not said yet what it wants --------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # the peer is gone again, or descriptors are short: the others go on
            self._told.tell("", f"a connection could not be accepted: {error.strerror}")
            return
        who = str(address[0])
        if len(self._waiting) + len(self._open) // 2 >= self._most:
            self._told.tell(who, f"refused a connection of {who}: there are {self._most} already")
            client.close()
            return
        if sum(1 for one in self._waiting.values() if one.host == who) >= MAX_WAITING_EACH:
            self._told.tell(who, f"refused a connection of {who}: {MAX_WAITING_EACH} of its have said nothing yet")
            client.close()
            return
        if len(self._waiting) >= MAX_WAITING:
            self._drop(next(iter(self._waiting.values())), "said nothing while many others came")
        client.setblocking(False)
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE_SECONDS // 2),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, GONE_SECONDS // 4)),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_SECONDS * 1000),
        ):
            client.setsockopt(level, option, value)
        waiting = _Waiting(client, who, f"{who}:{address[1]}", time.monotonic() + self._hello_seconds)
        self._waiting[client.fileno()] = waiting
        self._epoll.register(client, _EDGES)
        self._look(waiting)

    def _look(self, waiting: _Waiting) -> None:
        """Look at what has come; hand the connection on once that says what it wants."""
        try:
            head = waiting.client.recv(MAX_HELLO, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(waiting, "")
            return
        if not head:
            self._drop(waiting, "")  # somebody who only looked whether the port is open
            return
        try:
            protocol = protocol_of(head)
            if protocol is None:
                return
            to = self._servers.get(protocol)
            if to is None:
                raise MalformedMessage(f"this port does not serve {protocol}", where="hello")
        except MalformedMessage as error:
            self._drop(waiting, f"was refused: {error.what}")
            return
        if isinstance(to, str):
            self._splice(waiting, to)
        else:
            self._hand_on(waiting, to)

    def _hand_on(self, waiting: _Waiting, take: Callable[[socket.socket], None]) -> None:
        del self._waiting[waiting.client.fileno()]
        self._epoll.unregister(waiting.client)
        try:
            take(waiting.client)
        except OSError as error:
            waiting.client.close()
            self._told.tell(
                waiting.host, f"the connection of {waiting.who} could not be served: {error.strerror or error}"
            )

    def _splice(self, waiting: _Waiting, path: str) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.setblocking(False)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIPE)
            server.connect(path)
            spliced = _Spliced(waiting.client, server)
        except OSError as error:
            server.close()
            self._drop(waiting, f"could not be served: {error.strerror}")
            return
        del self._waiting[waiting.client.fileno()]
        self._open[waiting.client.fileno()] = self._open[server.fileno()] = spliced
        self._epoll.register(server, _EDGES)
        self._queue(spliced)

    def _drop(self, waiting: _Waiting, why: str) -> None:
        del self._waiting[waiting.client.fileno()]
        if why:
            self._told.tell(waiting.host, f"the connection of {waiting.who} {why}")
        waiting.client.close()

    # --- what is served -----------------------------------------------------------------------------------------------

    def _queue(self, spliced: _Spliced) -> None:
        if not spliced.queued:
            spliced.queued = True
            self._ready.append(spliced)

    def _move(self, spliced: _Spliced) -> None:
        spliced.queued = False
        if spliced.closed:
            return
        try:
            again = spliced.move()
        except OSError:  # either end is gone
            again = None
        if again is None:
            for descriptor in spliced.descriptors:
                self._open.pop(descriptor, None)
            spliced.close()
        elif again:
            self._queue(spliced)

    def _sweep(self, now: float) -> None:
        for waiting in list(self._waiting.values()):
            if now >= waiting.until:
                self._drop(waiting, f"said no whole ClientHello within {self._hello_seconds:g} s")
        for spliced in set(self._open.values()):
            if spliced.half_open and now - spliced.moved_at > HALF_OPEN_SECONDS:
                for descriptor in spliced.descriptors:
                    self._open.pop(descriptor, None)
                spliced.close()


class _Waiting:
    """A connection that has not said yet what it wants."""

    def __init__(self, client: socket.socket, host: str, who: str, until: float) -> None:
        self.client = client
        self.host = host
        self.who = who
        self.until = until


class _Spliced:
    """Two sockets that are tied together by a pipe in each direction."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._sockets = (client, server)
        self.descriptors = (client.fileno(), server.fileno())
        self._up = _Direction(client, server)
        try:
            self._down = _Direction(server, client)
        except OSError:
            self._up.close()
            raise
        self.queued = False
        self.closed = False
        self.moved_at = time.monotonic()

    @property
    def half_open(self) -> bool:
        """Whether one side has ended, though the other may not have taken all of what it said."""
        return self._up.ended or self._down.ended

    def move(self) -> bool | None:
        """Move what can be moved: whether more may be at once; None when both sides have ended. Raises OSError."""
        again = False
        for direction in (self._up, self._down):
            moved, more = direction.move()
            again = again or more
            if moved:
                self.moved_at = time.monotonic()
        return None if self._up.done and self._down.done else again

    def close(self) -> None:
        self.closed = True
        for one in (self._up, self._down, *self._sockets):
            one.close()


class _Direction:
    """From one socket through a pipe to another."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source = source.fileno()
        self._target = target
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # an unprivileged user's pipes may be smaller
            fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE)
        self._held = 0
        self.ended = False
        self.done = False

    def move(self) -> tuple[bool, bool]:
        """Whether anything moved, and whether more may be moved at once. Raises OSError."""
        moved = False
        for _ in range(_TURNS):
            if self.done or not (self._fill() | self._drain()):
                return moved, False
            moved = True
        return moved, True

    def _fill(self) -> bool:
        if self.ended:
            return False
        try:
            count = os.splice(self._source, self._in, _PIPE, flags=_SPLICE)
        except BlockingIOError:
            return False
        self.ended = count == 0
        self._held += count
        return True

    def _drain(self) -> bool:
        if not self._held:
            if self.ended and not self.done:
                self.done = True
                with contextlib.suppress(OSError):  # it is gone as a whole
                    self._target.shutdown(socket.SHUT_WR)
            return False
        try:
            count = os.splice(self._out, self._target.fileno(), self._held, flags=_SPLICE)
        except BlockingIOError:
            return False
        self._held -= count
        return count > 0

    def close(self) -> None:
        os.close(self._in)
        os.close(self._out)


class _Told:
    """Tells of what strangers do, once per address in a while, with how often it was since."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def tell(self, who: str, line: str) -> None:
        since, unsaid = self._seen.get(who, (-_TOLD_SECONDS, 0))
        now = time.monotonic()
        if now - since < _TOLD_SECONDS:
            self._seen[who] = (since, unsaid + 1)
            return
        self._seen[who] = (now, 0)
        self._seen.move_to_end(who)
        while len(self._seen) > 1024:
            self._seen.popitem(last=False)
        self._tell(f"{line} (and {unsaid} more before)" if unsaid else line)
