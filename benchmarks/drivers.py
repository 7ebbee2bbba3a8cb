"""Seconds that each driver takes to move models, beside a bare loop of the same libraries.

A round moves a model down to each of two sites and as many bytes up from each, at the same time, between one process
with two threads and a server process, over TLS, in messages of 1 MiB. The bare loop is grpc, or aiohttp with uvloop and
http.client, and nothing else. The driver is ours: attested mutual TLS 1.3 over the one port, model bytes in checked
chunks from a memory file; what comes is checked and dropped, and no script runs and nothing is folded. Rounds of
both go in turn, so that other work on the machine meets both; medians count.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.certificate import make_certificate
from benchmarks.trials import load_trial, tell

if TYPE_CHECKING:
    from fl.server.calls import Caller

CHUNK = 1 << 20
DRIVERS = ("grpc", "https")


def measure(*, megabytes: float = 100, rounds: int = 7, driver: str) -> dict[str, float]:
    """Median seconds of a driver's round and of the bare loop's, and the driver's share. Call it once in a process."""
    trial = load_trial("fl/federation_world.py", "federation_trial")
    size = int(megabytes * 1e6)
    with ExitStack() as ends:
        world = trial.found_federation(Path(ends.enter_context(tempfile.TemporaryDirectory())))
        world.way = {"driver": driver}
        key, certificate = make_certificate()
        # Both servers are forked before grpc starts in this process: it does not live through a fork.
        bare = ends.enter_context(served(SERVE_BARE[driver], key, certificate, size))
        own = ends.enter_context(served(_serve_driver, world, trial.SERVER, driver, size))
        bare_round = ends.enter_context(BARE_ROUNDS[driver](int(received(bare)), certificate, size))
        own_round = ends.enter_context(_driver_rounds(world, trial, str(received(own)), size))
        times: dict[str, list[float]] = {"bare": [], "driver": []}
        for number in range(rounds + 1):
            tell(f"drivers: {driver}, {megabytes:g} MB, round {number} of {rounds}")
            times["bare"].append(bare_round())
            times["driver"].append(own_round())
    alone, whole = (statistics.median(times[name][1:]) for name in ("bare", "driver"))  # the first one connects
    return {"driver_seconds": whole, "bare_seconds": alone, "share_of_bare": alone / whole}


@contextmanager
def served(serve: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A server in a process of its own, until the end; over the pipe it says where it listens."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=serve, args=(theirs, *arguments))
    process.start()
    try:
        yield ours
    finally:
        ours.send("stop")
        process.join(20)
        if process.is_alive():
            process.kill()


def received(pipe: Connection) -> Any:
    """What a server says first."""
    if not pipe.poll(30):
        raise RuntimeError("a server does not listen after 30 seconds")
    return pipe.recv()


def together(*work: Callable[[], None]) -> float:
    """Seconds until all have done it, each on a thread of its own."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(one) for one in work]:
            done.result(600)
    return time.perf_counter() - start


def pieces_of(piece: bytes, size: int) -> Iterator[bytes]:
    """`size` bytes in messages of 1 MiB."""
    for start in range(0, size, CHUNK):
        yield piece[: min(CHUNK, size - start)]


class _Transfers:
    """A service whose calls move models and do nothing with them, in the place of `fl.server.service`."""

    streamed = ("Deliver",)
    asked = ("Fetch",)

    def __init__(self, party: Any, size: int) -> None:
        from fl.transport.memory import SealedMemory

        self._party = party
        self._model = SealedMemory.of(bytes(size))

    def appraise(self) -> bytes:
        from fl.transport.frames import Lease, pack

        return pack(Lease(ears=self._party.identity().ears))

    def answer(self, name: str, request: Any, caller: Caller) -> Iterator[bytes]:
        from fl.server.calls import unstalled, untaken
        from fl.transport.chunks import checked, serve_chunks
        from fl.transport.frames import Verdict, pack

        if name == "Fetch":
            yield from untaken(serve_chunks(self._model.view), caller)
            return
        frames, size = unstalled(request, caller), self._model.size
        count = sum(map(len, checked(frames, start=0, size=size, where="benchmark")))
        yield pack(Verdict(accepted=count == size))


def _serve_driver(pipe: Connection, world: Any, server: str, driver: str, size: int) -> None:
    from datetime import UTC, datetime

    from fl.party import Party
    from fl.server.certificates import ServerCertificates
    from fl.server.grpc_server import GrpcServer
    from fl.server.https_server import HttpsServer
    from fl.server.job import memory_folder
    from fl.transport.port import Port

    identity = world.identity("server", server, seconds=900)
    party = Party(lambda: identity, world.charter, lambda: datetime.now(UTC), world.record, world.told.append)
    service: Any = _Transfers(party, size)
    with ExitStack() as ends:
        path = ends.enter_context(tempfile.TemporaryDirectory(dir=memory_folder())) + "/socket"
        certificates = ServerCertificates(party)
        servers: dict[str, Any] = {}
        if driver == "grpc":
            grpc = GrpcServer(service, certificates, path)
            ends.callback(grpc.close)
            servers = {"grpc": path}
        else:
            https = HttpsServer(service, certificates, path, tunnels={})
            ends.callback(https.close)
            servers = {"https": https.take}
        port = Port("127.0.0.1:0", servers, tell=world.told.append)
        ends.callback(port.close)
        pipe.send(port.address)
        pipe.recv()


@contextmanager
def _driver_rounds(world: Any, trial: Any, address: str, size: int) -> Iterator[Callable[[], float]]:
    from fl.transport.channel import ServerConnection, connect
    from fl.transport.chunks import checked, serve_chunks
    from fl.transport.frames import Fetch, Verdict, adapter_of, unpack
    from fl.transport.memory import SealedMemory

    update = SealedMemory.of(bytes(size))
    fetch = Fetch(job="bench", what="model", sha256="0" * 64, offset=0)

    def site(connection: ServerConnection) -> None:
        call = connection.ask("Fetch", fetch, timeout=600)
        count = sum(map(len, checked(call, start=0, size=size, where="benchmark")))
        call.cancel()
        for raw in connection.call("Deliver", serve_chunks(update.view), timeout=600):
            verdict, _ = unpack(adapter_of(Verdict), raw, where="benchmark")
            if count != size or not verdict.accepted:
                raise RuntimeError("the driver lost bytes")

    with ExitStack() as ends:
        connections = []
        for name in trial.SITES:
            own = world.identity("site", name, seconds=900)
            keys = {"tls_key": own.tls_key_pem, "certificate_pem": own.certificate_pem}
            opened = connect(world.to(address), server=trial.SERVER, charter=world.charter, clock=trial.now, **keys)
            connections.append(ends.enter_context(opened))
        yield lambda: together(*(lambda one=one: site(one) for one in connections))


def _serve_bare_grpc(pipe: Connection, key: bytes, certificate: bytes, size: int) -> None:
    import grpc

    piece = bytes(CHUNK)

    def pull(_request: bytes, _context: object) -> Iterator[bytes]:
        return pieces_of(piece, size)

    def push(pieces: Iterator[bytes], _context: object) -> bytes:
        return str(sum(map(len, pieces))).encode()

    handlers: dict[str, Any] = {
        "pull": grpc.unary_stream_rpc_method_handler(pull),
        "push": grpc.stream_unary_rpc_method_handler(push),
    }
    server = grpc.server(ThreadPoolExecutor(4), options=(("grpc.max_receive_message_length", 2 * CHUNK),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    pipe.send(port)
    pipe.recv()
    server.stop(1).wait(5)


@contextmanager
def _bare_grpc_rounds(port: int, certificate: bytes, size: int) -> Iterator[Callable[[], float]]:
    import grpc

    piece = bytes(CHUNK)

    def site(channel: Any) -> None:
        count = sum(map(len, channel.unary_stream("/bench/pull")(b"", timeout=600)))
        if count != size or int(channel.stream_unary("/bench/push")(pieces_of(piece, size), timeout=600)) != size:
            raise RuntimeError("the bare loop lost bytes")

    options = (("grpc.max_receive_message_length", 2 * CHUNK), ("grpc.use_local_subchannel_pool", 1))
    credentials = grpc.ssl_channel_credentials(certificate)
    channels = [grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) for _ in range(2)]
    yield lambda: together(*(lambda one=one: site(one) for one in channels))
    for channel in channels:
        channel.close()


def _serve_bare_https(pipe: Connection, key: bytes, certificate: bytes, size: int) -> None:
    import asyncio

    import uvloop
    from aiohttp import web

    piece = bytes(CHUNK)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST":
            count = 0
            while part := await request.content.read(CHUNK):
                count += len(part)
            return web.Response(text=str(count))
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for part in pieces_of(piece, size):
            await response.write(part)
        await response.write_eof()
        return response

    async def serve() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile() as file:
            file.write(key + certificate)
            file.flush()
            context.load_cert_chain(file.name)
        server = web.Server(handle, read_bufsize=1 << 20, access_log=None)
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=context)
        pipe.send(listener.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    uvloop.run(serve())


@contextmanager
def _bare_https_rounds(port: int, certificate: bytes, size: int) -> Iterator[Callable[[], float]]:
    context = ssl.create_default_context(cadata=certificate.decode())
    piece = bytes(CHUNK)

    def site(connection: http.client.HTTPSConnection) -> None:
        connection.request("GET", "/")
        response, count = connection.getresponse(), 0
        while part := response.read(CHUNK):
            count += len(part)
        chunked = {"Transfer-Encoding": "chunked"}
        connection.request("POST", "/", pieces_of(piece, size), encode_chunked=True, headers=chunked)
        if count != size or int(connection.getresponse().read()) != size:
            raise RuntimeError("the bare loop lost bytes")

    connections = [http.client.HTTPSConnection("127.0.0.1", port, timeout=600, context=context) for _ in range(2)]
    yield lambda: together(*(lambda one=one: site(one) for one in connections))
    for connection in connections:
        connection.close()


SERVE_BARE = {"grpc": _serve_bare_grpc, "https": _serve_bare_https}
BARE_ROUNDS = {"grpc": _bare_grpc_rounds, "https": _bare_https_rounds}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("megabytes", type=float)
    parser.add_argument("rounds", type=int)
    parser.add_argument("driver", choices=DRIVERS)
    chosen = parser.parse_args()
    json.dump(measure(megabytes=chosen.megabytes, rounds=chosen.rounds, driver=chosen.driver), sys.stdout)
