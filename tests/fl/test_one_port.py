"""The port: who says nothing, too much or too slowly is dropped, named, and in nobody's way."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from federation_world import wait_until
from test_client_hello import hello_of

from fl.transport.port import Port


class Echo:
    """A server on a UNIX socket that says its name and then sends back what it gets."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.open = 0
        self.name = path.name.encode()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self.open += 1
        with connection, contextlib.suppress(OSError):
            connection.sendall(self.name + b"\n")
            while piece := connection.recv(1 << 16):
                connection.sendall(piece)
        self.open -= 1

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, Echo]]:
    found = {name: Echo(tmp_path / name) for name in ("grpc", "https")}
    yield found
    for server in found.values():
        server.close()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def port(servers: dict[str, Echo], told: list[str]) -> Iterator[Port]:
    port = Port(
        "127.0.0.1:0",
        {name: server.path for name, server in servers.items()},
        tell=told.append,
        hello_seconds=0.5,
    )
    yield port
    port.close()


def dial(port: Port) -> socket.socket:
    host, _, number = port.address.rpartition(":")
    connection = socket.create_connection((host, int(number)), 10)
    connection.settimeout(10)
    return connection


def read_line(connection: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n") and (byte := connection.recv(1)):
        found += byte
    return found


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(("protocol", "server"), [("h2", b"grpc\n"), ("http/1.1", b"https\n")])
def test_what_a_client_sends_arrives_whole(port: Port, protocol: str, server: bytes) -> None:
    sent = hello_of(protocol) + os.urandom(3 << 20)
    with dial(port) as connection:
        writer = threading.Thread(target=connection.sendall, args=(sent,))
        writer.start()
        assert read_line(connection) == server
        back = bytearray()
        while len(back) < len(sent):
            back += connection.recv(1 << 20)
        writer.join(10)
        assert bytes(back) == sent
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)


def test_a_hello_in_pieces_is_waited_for(port: Port) -> None:
    raw = hello_of("h2", name=".".join(["x" * 60] * 3))
    with dial(port) as connection:
        for at in range(0, len(raw), 60):
            connection.sendall(raw[at : at + 60])
            time.sleep(0.02)
        assert read_line(connection) == b"grpc\n"


def test_whoever_dribbles_or_says_nothing_is_dropped_and_named(port: Port, told: list[str]) -> None:
    with dial(port) as silent, dial(port) as slow:
        slow.sendall(hello_of("h2")[:50])
        assert is_closed(silent)
        assert is_closed(slow)
    assert wait_until(lambda: any("said no whole ClientHello within 0.5 s" in line for line in told))
    assert told[0].startswith("the connection of 127.0.0.1:")


@pytest.mark.parametrize(
    "said", [b"\x16\x03\x01\xff\xff" + bytes(70000), b"SSH-2.0-x\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 10]
)
def test_what_is_no_hello_of_ours_is_refused_at_once_and_named(port: Port, told: list[str], said: bytes) -> None:
    with dial(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(said)
        assert is_closed(connection)
    assert wait_until(lambda: any("was refused: " in line for line in told))


def test_many_that_say_nothing_are_in_nobodys_way(port: Port, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl.transport.port.MAX_WAITING_EACH", 5)
    port._hello_seconds = 30.0
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(port)) for _ in range(5)]
        with dial(port) as one_more:
            assert is_closed(one_more)
        assert wait_until(lambda: any("5 of its have said nothing yet" in line for line in told))
        silent[0].sendall(hello_of("h2"))
        assert read_line(silent[0]) == b"grpc\n"
        with dial(port) as connection:
            connection.sendall(hello_of("h2"))
            assert read_line(connection) == b"grpc\n"


def test_the_oldest_that_says_nothing_goes_first(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl.transport.port.MAX_WAITING", 3)
    port._hello_seconds = 30.0
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial(port)) for _ in range(4)]
        assert is_closed(silent[0])
        silent[3].sendall(hello_of("http/1.1"))
        assert read_line(silent[3]) == b"https\n"


def test_a_stranger_is_told_of_once_in_a_while(port: Port, told: list[str]) -> None:
    for _ in range(30):
        with dial(port) as connection:
            connection.sendall(b"\0" * 10)
            assert is_closed(connection)
    assert len(told) == 1


def test_a_connection_of_which_half_is_gone_ends(
    port: Port, servers: dict[str, Echo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has ended its side, and a client that neither ends its own nor says anything."""
    monkeypatch.setattr("fl.transport.port.HALF_OPEN_SECONDS", 0.3)
    with dial(port) as connection:
        connection.sendall(hello_of("h2"))
        assert read_line(connection) == b"grpc\n"
        port_side = next(iter(port._open.values()))
        port_side._up._target.shutdown(socket.SHUT_RD)  # as a server does that is done
        assert wait_until(lambda: not port._open)
    assert wait_until(lambda: servers["grpc"].open == 0)


def test_a_client_that_resets_leaves_nothing_behind(port: Port, servers: dict[str, Echo]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        connection = dial(port)
        connection.sendall(hello_of("h2"))
        assert read_line(connection) == b"grpc\n"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    assert wait_until(lambda: not port._open and servers["grpc"].open == 0)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_server_that_is_gone_is_named(servers: dict[str, Echo], told: list[str], tmp_path: Path) -> None:
    port = Port("127.0.0.1:0", {"grpc": str(tmp_path / "nobody")}, tell=told.append)
    try:
        with dial(port) as connection:
            connection.sendall(hello_of("h2"))
            assert is_closed(connection)
        assert any("could not be served" in line for line in told)
    finally:
        port.close()
