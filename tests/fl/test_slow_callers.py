"""Callers with good certificates that dribble, stall, flood or lie in HTTP itself: bounded, and in nobody's way."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation_world import SERVER, SITES, FederationWorld, found_federation, wait_until

from attestation.identity import Identity
from fl.server.service import FederationService
from fl.transport.frames import MAX_FRAME, Lease, pack
from fl.transport.port import Port
from fl.transport.tls import client_context


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    found = found_federation(tmp_path_factory.mktemp("world"))
    found.way = {"driver": "https"}
    return found


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setattr("fl.server.https_server.IDLE_SECONDS", 1.0)
    patch.setattr("fl.transport.https_channel.IDLE_SECONDS", 0.2)  # clients give a connection up before the server does
    patch.setattr("fl.server.https_server.HANDSHAKE_SECONDS", 1.0)
    patch.setattr("fl.server.calls.STALL_SECONDS", 1.0)
    with world.server() as address:
        yield address
    patch.undo()


@pytest.fixture(scope="module")
def identity(world: FederationWorld) -> Identity:
    return world.identity("site", SITES[0], seconds=600)


@contextlib.contextmanager
def talk(address: str, identity: Identity | None) -> Iterator[ssl.SSLSocket]:
    """TLS to the server as this guest, or as nobody."""
    if identity is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
    else:
        context = client_context(identity.tls_key_pem, identity.certificate_pem, ["http/1.1"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 15) as plain,
        context.wrap_socket(plain, server_hostname=f"{SERVER}.server.sealwright.internal") as secure,
    ):
        secure.settimeout(15)
        yield secure


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := connection.recv(65536):
            found += piece
    return found


def request(path: str, *body: bytes, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n{headers}\r\n".encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in body) + b"0\r\n\r\n"


def is_served(world: FederationWorld, server: str) -> bool:
    with world.client(server) as client:
        return client.reports().jobs == ()


def test_a_handshake_that_stops_is_cut_off(world: FederationWorld, server: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    host, _, port = server.rpartition(":")
    with socket.create_connection((host, int(port)), 15) as plain:
        plain.settimeout(15)
        plain.sendall(outgoing.read())
        assert answer(plain)  # its hello, and then the end
    assert is_served(world, server)


def test_headers_that_dribble_are_cut_off(world: FederationWorld, server: str, identity: Identity) -> None:
    with talk(server, identity) as connection:
        connection.sendall(b"POST /v1/Jobs HTTP/1.1\r\nHost: hub\r\nX-More: ")
        assert answer(connection) == b""
    assert is_served(world, server)


def test_an_idle_connection_is_closed(server: str, identity: Identity) -> None:
    with talk(server, identity) as connection:
        assert answer(connection) == b""


def test_a_body_that_dribbles_is_cut_off(world: FederationWorld, server: str, identity: Identity) -> None:
    with talk(server, identity) as connection:
        connection.sendall(b"POST /v1/Jobs HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n\0\0\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 408 ")
    assert is_served(world, server)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request("/v1/Jobs"), b"400"),
        (request("/v1/Jobs", struct.pack(">I", MAX_FRAME + 1)), b"400"),
        (request("/v1/Jobs", b"\xff\xff\xff\xff"), b"400"),
        (request("/v1/Jobs", b"\0\0\0\1xx"), b"400"),
        (request("/v1/Jobs", b"\0\0\0\1x", b"\0\0\0\1x"), b"400"),
        (request("/v1/Attend"), b"400"),
        (request("/v1/Attend", headers="Call: ../../etc/passwd\r\n"), b"400"),
        (request("/v1/Attend", b"\0\0\0\1x", headers=f"Call: {'a' * 32}\r\n"), b"400"),
        (request(f"/v1/Attend/{'b' * 32}", b"\0\0\0\1x"), b"410"),
        (request("/v1/Nothing", b"\0\0\0\1x"), b"404"),
        (request("/v1/tunnel/grpc"), b"410"),
        (request("/v1/../v1/Jobs"), b"404"),
        (request("/v1/Jobs?x=1"), b"404"),
        (b"GET /v1/Jobs HTTP/1.1\r\nHost: hub\r\n\r\n", b"405"),
        (b"GET /v1/tunnel/grpc HTTP/1.1\r\nHost: hub\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n", b"404"),
        (b"POST /v1/Jobs HTTP/1.1\r\nX: " + b"x" * 70000 + b"\r\n\r\n", b"400"),
        (b"POST /v1/Jobs HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"\0\1\2\3\r\n\r\n", b"400"),
    ],
)
def test_http_that_is_none_of_ours_is_refused(
    world: FederationWorld, server: str, identity: Identity, raw: bytes, status: bytes
) -> None:
    with talk(server, identity) as connection:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            connection.sendall(raw)
        assert re.match(rb"HTTP/1\.[01] " + status, answer(connection)), raw[:60]
    assert is_served(world, server)


def test_without_a_certificate_there_is_no_https(server: str) -> None:
    with contextlib.suppress(ssl.SSLError, ConnectionError), talk(server, None) as connection:
        connection.sendall(request("/v1/Appraise"))
        assert answer(connection) == b""


def test_another_guest_cannot_speak_in_a_call(world: FederationWorld, server: str, identity: Identity) -> None:
    """Frames of a call come from the certificate that opened it, or from nobody."""
    other = world.identity("site", SITES[1], seconds=600)
    call = os.urandom(16).hex()
    lease = pack(Lease(ears=identity.ears))
    record = struct.pack(">I", len(lease)) + lease
    with talk(server, identity) as mine, talk(server, other) as foreign:
        mine.sendall(request("/v1/Attend", headers=f"Call: {call}\r\n"))
        assert mine.recv(65536).startswith(b"HTTP/1.1 200")
        foreign.sendall(request(f"/v1/Attend/{call}", record))
        assert answer(foreign).startswith(b"HTTP/1.1 410")
        with talk(server, identity) as more:
            more.sendall(request(f"/v1/Attend/{call}", record))
            assert more.recv(65536).startswith(b"HTTP/1.1 204")
        assert wait_until(lambda: f"site {SITES[0]} is connected" in world.told)


def test_a_reader_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    """A site that asks for a large model and reads none of it: its call ends, and its thread is free."""
    import numpy as np
    from federation_world import make_job
    from raw_site import raw_site

    from fl.transport.frames import Fetch, Prepare, Ready, Train

    world = found_federation(tmp_path)
    world.way = {"driver": "https"}
    patch = pytest.MonkeyPatch()
    services: list[FederationService] = []
    ports: list[Port] = []

    class Seen(FederationService):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            services.append(self)

    class SeenPort(Port):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            ports.append(self)

    patch.setattr("fl.server.start.FederationService", Seen)
    patch.setattr("fl.server.start.Port", SeenPort)
    patch.setattr("fl.server.calls.STALL_SECONDS", 1.0)
    patch.setattr("fl.transport.port.HALF_OPEN_SECONDS", 1.0)
    bundle, model = make_job(
        tmp_path, num_rounds=1, min_clients=1, initial_model={"w": np.zeros(8 << 20, dtype=np.float32)}
    )
    world.approve(bundle)
    mine = world.identity("site", SITES[1], seconds=600)
    with (
        world.server() as address,
        world.site(address, SITES[0], number=2.0),
        raw_site(world, address, mine) as site,
        world.client(address) as client,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        site.say(Ready(job=site.hear(Prepare).job))
        task = site.hear(Train)
        fetch = pack(Fetch(job=job, what="model", sha256=task.model_sha256, offset=0))
        with talk(address, mine) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request("/v1/Fetch", struct.pack(">I", len(fetch)) + fetch))
            assert wait_until(lambda: services[0]._calls[mine.certificate_der] == 2)
            assert wait_until(lambda: services[0]._calls[mine.certificate_der] == 1, 20)
            assert wait_until(lambda: not [one for one in ports[0]._open.values() if one.half_open], 20)
    patch.undo()
