"""Proxies for tests: one that connects where it is told to (CONNECT), and ones that end TLS, as firms have them."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Change = Callable[[bytes], bytes]


@dataclass
class Proxy:
    """A running proxy: where it listens, and all that it saw."""

    address: str
    seen: bytearray = field(default_factory=bytearray)
    asked: list[str] = field(default_factory=list)
    connections: int = 0
    change: Change = bytes
    """What it makes of each piece that goes up."""
    down: bool = False
    """Whether the network is cut: what is open ends, what comes is refused."""
    flows: threading.Event = field(default_factory=threading.Event)
    """Without it nothing moves, and nothing ends."""
    open: set[socket.socket] = field(default_factory=set)

    def cut(self) -> None:
        """Cut every connection, until `mend`."""
        self.down = True
        for one in list(self.open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """The network is there again."""
        self.down = False


@contextmanager
def _listening(serve: Callable[[socket.socket, Proxy], None]) -> Iterator[Proxy]:
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(f"127.0.0.1:{listener.getsockname()[1]}")
    proxy.flows.set()
    over = threading.Event()

    def one(connection: socket.socket) -> None:
        proxy.connections += 1
        with connection, contextlib.suppress(OSError):
            if proxy.down:
                return
            proxy.open.add(connection)
            connection.settimeout(120)
            serve(connection, proxy)
        proxy.open.discard(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _tie(near: socket.socket, far: socket.socket, proxy: Proxy) -> None:
    def copy(source: socket.socket, target: socket.socket, change: Change) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(1 << 16)) and proxy.flows.wait(300):
                proxy.seen.extend(piece)
                target.sendall(change(piece))
        for one in (source, target):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    back = threading.Thread(target=copy, args=(far, near, bytes), daemon=True)
    back.start()
    copy(near, far, lambda piece: proxy.change(piece))
    back.join(10)


@contextmanager
def connecting_proxy() -> Iterator[Proxy]:
    """An HTTP proxy that knows CONNECT alone."""

    def serve(near: socket.socket, proxy: Proxy) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(4096)
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        proxy.asked.append(f"{method} {target}")
        if method != "CONNECT":
            near.sendall(b"HTTP/1.1 405 No\r\n\r\n")
            return
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as far:
            near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            _tie(near, far, proxy)

    with _listening(serve) as proxy:
        yield proxy


@contextmanager
def passing_proxy(to: str) -> Iterator[Proxy]:
    """A proxy that passes bytes on."""

    def serve(near: socket.socket, proxy: Proxy) -> None:
        host, _, port = to.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as far:
            _tie(near, far, proxy)

    with _listening(serve) as proxy:
        yield proxy


@contextmanager
def ending_proxy(folder: Path, to: str, *, tls_to: bool, tls: bool = True) -> Iterator[tuple[Proxy, str]]:
    """A proxy that ends TLS (or has none) and goes on to `to` by TLS of its own or in clear; its certificate (PEM)."""
    key, certificate = certificate_of_proxy()
    (folder / "proxy.pem").write_text(key + certificate)
    inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inward.load_cert_chain(folder / "proxy.pem")
    inward.set_alpn_protocols(["http/1.1"])
    outward = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outward.check_hostname = False
    outward.verify_mode = ssl.CERT_NONE
    outward.set_alpn_protocols(["http/1.1"])

    proxy = Proxy("")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = to.rpartition(":")
        proxy.connections += 1
        ends, ways = [writer], []
        try:
            back, onward = await asyncio.open_connection(host, int(port), ssl=outward if tls_to else None)
            ends.append(onward)
            ways.append(asyncio.ensure_future(_pump(reader, onward, proxy, lambda piece: proxy.change(piece))))
            ways.append(asyncio.ensure_future(_pump(back, writer, proxy, bytes)))
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            return
        finally:
            for way in ways:
                way.cancel()
            for end in ends:
                end.transport.abort()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    begun = asyncio.start_server(serve, "127.0.0.1", 0, ssl=inward if tls else None)
    server = asyncio.run_coroutine_threadsafe(begun, loop).result(10)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy, certificate
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, proxy: Proxy, change: Change) -> None:
    """Pass on what comes. On one thread: two may not use one TLS connection at the same time."""
    with contextlib.suppress(OSError):
        while piece := await source.read(1 << 16):
            proxy.seen.extend(piece)
            target.write(change(piece))
            await target.drain()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.05)  # what was closed tells the loop so


def certificate_of_proxy() -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return private, certificate.public_bytes(Encoding.PEM).decode()
