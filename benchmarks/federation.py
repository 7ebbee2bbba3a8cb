"""Seconds of a hello job in SimEnv, and of rounds of random weights over mutual TLS, beside a bare loop.

A round runs from one aggregation to the next, as a user that watches sees them: two sites pull the model, their
sandboxed scripts send it back, the server checks and folds it. The server is a process of its own, the sites are
threads of another. The limit: the same bytes (each site's model down and update up, in 1 MiB messages) between two
threads and a server process over TLS by the driver's libraries alone (grpc; aiohttp with uvloop, and http.client),
before the rounds in the same run. Medians count.
Memory of the server process:
the most that /proc/PID/smaps_rollup showed, looked at five times a second.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.certificate import make_certificate
from benchmarks.trials import ROOT, load_trial, tell

CHUNK = 1 << 20
DRIVERS = ("grpc", "https")
ECHO = """
from fl import client as flare
flare.init()
while flare.is_running():
    flare.send(flare.FLModel(params=flare.receive().params))
"""
HELLO = """
import numpy as np
from fl import FedAvgRecipe, SimEnv
recipe = FedAvgRecipe(name="hello", min_clients=2, num_rounds=2, train_script="client.py",
                      initial_model={"w": np.zeros(3, dtype=np.float32)})
run = recipe.execute(SimEnv(num_clients=2, workspace_root="work"))
assert run.get_status() == "finished", run.get_status()
"""


def measure(
    *, megabytes: tuple[float, ...] = (10, 100), rounds: int = 5, hellos: int = 3, drivers: tuple[str, ...] = DRIVERS
) -> dict[str, float | dict[str, float]]:
    """A hello job, and a round of each size (two sites), each size in a process of its own."""
    found: dict[str, float | dict[str, float]] = {"hello_job_seconds": _hello(hellos)}
    for size, driver in itertools.product(megabytes, drivers):
        tell(f"federation: rounds of {size:g} MB over {driver}")
        command = [sys.executable, "-m", "benchmarks.federation", str(size), str(rounds), driver]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
        found[f"round_of_{size:g}_MB_over_{driver}"] = json.loads(done.stdout)
    return found


def _hello(count: int) -> float:
    times = []
    for number in range(count):
        tell(f"federation: hello job {number + 1} of {count}")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "client.py").write_text(ECHO)
            (Path(folder) / "job.py").write_text(HELLO)
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "job.py"], cwd=folder, check=True, timeout=120, stdout=2, env=_environment()
            )
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def rounds_of(megabytes: float, rounds: int, driver: str) -> dict[str, float]:
    """Median seconds of a round and of the bare loop, their ratio, the server's memory. Call it once in a process."""
    trial = load_trial("fl/federation_world.py", "federation_trial")
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = trial.found_federation(folder)
        world.way = {"driver": driver}
        count = max(1, int(megabytes * 1e6 / 4))
        weights = np.random.default_rng(7).standard_normal(count, dtype=np.float32)
        bundle, model = trial.make_job(
            folder, ECHO, initial_model={"w": weights}, num_rounds=rounds + 1, round_seconds=600
        )
        del weights
        world.approve(bundle)
        key, certificate = make_certificate()
        # Both servers are forked before grpc starts in this process: it does not live through a fork.
        bare, bare_end = fork.Pipe()
        own, own_end = fork.Pipe()
        serve_bare = _serve_bare if driver == "grpc" else _serve_bare_https
        bare_server = fork.Process(target=serve_bare, args=(bare_end, key, certificate, int(megabytes * 1e6)))
        own_server = fork.Process(target=_serve_world, args=(own_end, world))
        bare_server.start()
        own_server.start()
        try:
            bare_rounds = _bare_rounds if driver == "grpc" else _bare_rounds_https
            alone = bare_rounds(int(_received(bare)), certificate, int(megabytes * 1e6), rounds)
            address = str(_received(own))
            memory = _Memory(own_server.pid or 0)
            with (
                world.site(address, trial.SITES[0], patience=30.0),
                world.site(address, trial.SITES[1], patience=30.0),
                world.client(address) as client,
                model,
            ):
                job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
                events = client.watch(job, timeout=800)
                ends = [time.perf_counter() for event in events if event.kind == "aggregated"]
                if str(client.report(job).status.value) != "finished":
                    raise RuntimeError(f"the job did not finish: {world.told}")
            most = memory.most()
        finally:
            for pipe, process in ((bare, bare_server), (own, own_server)):
                pipe.send("stop")
                process.join(20)
                if process.is_alive():
                    process.kill()
    whole = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return {
        "seconds": whole,
        "bare_seconds": alone,
        "share_of_round": alone / whole,
        **{f"server_{name.lower()}_megabytes": size * 1024 / 1e6 for name, size in most.items()},
    }


class _Memory:
    """The most that a process had, in KiB, by the fields of smaps_rollup."""

    def __init__(self, process: int) -> None:
        self._file = Path(f"/proc/{process}/smaps_rollup")
        self._most = {"Pss": 0, "Anonymous": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            for line in self._file.read_text().splitlines()[1:]:
                name, _, rest = line.partition(":")
                if name in self._most:
                    self._most[name] = max(self._most[name], int(rest.split()[0]))

    def most(self) -> dict[str, int]:
        """What was seen so far; it looks no more."""
        self._over.set()
        self._thread.join(5)
        return self._most


def _received(pipe: Any) -> Any:
    if not pipe.poll(30):
        raise RuntimeError("a server does not listen after 30 seconds")
    return pipe.recv()


def _serve_world(pipe: Connection, world: Any) -> None:
    with world.server() as address:
        pipe.send(address)
        pipe.recv()


def _serve_bare(pipe: Connection, key: bytes, certificate: bytes, size: int) -> None:
    import grpc

    piece = bytes(CHUNK)

    def pull(_request: bytes, _context: object) -> Iterator[bytes]:
        for start in range(0, size, CHUNK):
            yield piece[: min(CHUNK, size - start)]

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


def _bare_rounds(port: int, certificate: bytes, size: int, rounds: int) -> float:
    import grpc

    piece = bytes(CHUNK)

    def pieces() -> Iterator[bytes]:
        for start in range(0, size, CHUNK):
            yield piece[: min(CHUNK, size - start)]

    def site(pull: Callable[..., Any], push: Callable[..., Any]) -> None:
        if sum(map(len, pull(b"", timeout=60))) != size or int(push(pieces(), timeout=60)) != size:
            raise RuntimeError("the bare loop lost bytes")

    options = (("grpc.max_receive_message_length", 2 * CHUNK), ("grpc.use_local_subchannel_pool", 1))
    credentials = grpc.ssl_channel_credentials(certificate)
    channels = [grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) for _ in range(2)]
    methods: list[tuple[Any, Any]] = [
        (channel.unary_stream("/bench/pull"), channel.stream_unary("/bench/push")) for channel in channels
    ]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        threads = [threading.Thread(target=site, args=pair) for pair in methods]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        times.append(time.perf_counter() - start)
    for channel in channels:
        channel.close()
    return statistics.median(times[1:])  # the first one makes the connections


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
        for start in range(0, size, CHUNK):
            await response.write(piece[: min(CHUNK, size - start)])
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


def _bare_rounds_https(port: int, certificate: bytes, size: int, rounds: int) -> float:
    context = ssl.create_default_context(cadata=certificate.decode())
    piece = bytes(CHUNK)

    def site(connection: http.client.HTTPSConnection) -> None:
        connection.request("GET", "/")
        response, count = connection.getresponse(), 0
        while part := response.read(CHUNK):
            count += len(part)
        pieces = (piece[: min(CHUNK, size - start)] for start in range(0, size, CHUNK))
        connection.request("POST", "/", pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        if count != size or int(connection.getresponse().read()) != size:
            raise RuntimeError("the bare loop lost bytes")

    connections = [http.client.HTTPSConnection("127.0.0.1", port, timeout=120, context=context) for _ in range(2)]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        threads = [threading.Thread(target=site, args=(connection,)) for connection in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        times.append(time.perf_counter() - start)
    for connection in connections:
        connection.close()
    return statistics.median(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("megabytes", type=float)
    parser.add_argument("rounds", type=int)
    parser.add_argument("driver", choices=DRIVERS)
    chosen = parser.parse_args()
    json.dump(rounds_of(chosen.megabytes, chosen.rounds, chosen.driver), sys.stdout)
