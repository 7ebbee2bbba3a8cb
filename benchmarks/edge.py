"""Device updates a second through one gateway over TLS: each a request for a task and a result of a 100 KB model.

The gateway is processes of its own; this process is all devices, over CONNECTIONS kept alive. Every update is another
device's first: its token and signatures are checked, its requests are opened, its result is decoded, appraised (finite,
of the model, weight, norm) and folded. A device seals and signs on a processor of its own; here that is done between
the stretches that are timed, in each of which BATCH results are sent, and requests for as many tasks. Devices' TLS and
HTTP are in the same figure, since both share this machine.

Beside it stand the machine's own limits: bodies of the same sizes to a bare service over TLS that reads them and
answers as many bytes, and the cryptography of one update alone, on one core.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import secrets
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.bare_gateway import Served, cryptography_ms
from benchmarks.peers import environments, nvflare_edge
from benchmarks.trials import tell
from fl.edge.child import MOMENT_SECONDS
from fl.edge.deltas import encode_delta
from fl.edge.exchange import Reply
from fl.edge.gateway_workers import GatewayWorkers
from fl.edge.messages import ResultAnswer, ResultRequest, TaskAnswer, TaskRequest, read_words
from fl.edge.permits import Demand
from fl.edge.sealing import open_answer, seal_request
from fl.edge.settings import DeviceManagerConfig, EdgeSettings, ModelManagerConfig
from fl.edge.tokens import issue_token
from fl.edge.tree_frames import Offer
from fl.jobs.bundle import make_bundle
from fl.jobs.settings import JobSettings
from fl.party import Party
from fl.transport.port import Port
from policies.devices import DeviceIssuer

sys.path.append(str(Path(__file__).parents[1] / "tests/fl"))
from edge_world import FAST, found_edge, model_of, version_of

BATCH = 500
BATCHES = 6
CONNECTIONS = 16
PROCESSES = len(os.sched_getaffinity(0))
SHAPES = {"a.weight": (250, 96), "a.bias": (250,), "b.weight": (3, 250)}
"""25,000 numbers: 100 KB as float32."""


def measure() -> Mapping[str, object]:
    """Updates a second by encoding, and the most memory that the gateway had; beside them the machine's limits, and
    NVIDIA FLARE's edge stack with a model of the same size, where it is installed."""
    found: dict[str, object] = {}
    for encoding in ("int8", "bf16", "f32"):
        tell(f"edge: {encoding}")
        found[encoding] = _measured(encoding)
    found["machine"] = _limits()
    if "nvflare" in environments.installed():
        tell("edge: NVIDIA FLARE")
        with tempfile.TemporaryDirectory() as folder:
            found["NVIDIA FLARE"] = nvflare_edge.edge(Path(folder))
    return found


def _limits() -> Mapping[str, object]:
    """Requests and answers of the sizes of an f32 update, to nothing but TLS; the cryptography of one, alone."""
    updates = BATCH * BATCHES
    with tempfile.TemporaryDirectory() as folder:
        world = found_edge(Path(folder))
        own = world.identity()
        credentials = own.tls_key_pem, own.certificate_pem, world.federation.issuer.certificate_pem
    bare = Served(credentials, dict(_SIZES.values()), PROCESSES)
    try:
        lines = [_Line(bare.addresses[number % PROCESSES]) for number in range(CONNECTIONS)]
        work: list[tuple[str, Any]] = []
        for message, (size, _) in _SIZES.items():
            work += [(message, SimpleNamespace(body=bytes(size)))] * updates
        random.Random(1).shuffle(work)  # noqa: S311 - an order, not a secret
        seconds, spent = _sent(lines, work)
        for line in lines:
            line.close()
    finally:
        bare.close()
    return {
        "bare TLS, updates a second": round(updates / seconds),
        "devices' CPU ms an update, TLS and HTTP alone": round(1e3 * spent / updates, 3),
        "cryptography alone, ms an update": round(cryptography_ms([size for size, _ in _SIZES.values()]), 3),
    }


def _measured(encoding: str) -> Mapping[str, object]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gateway = context.Process(target=_serve, args=(theirs,))
    gateway.start()
    theirs.close()
    try:
        if not ours.poll(60):
            raise RuntimeError("the gateway does not start")
        address, *consortium = ours.recv()
        lines = [_Line(address) for _ in range(CONNECTIONS)]
        seconds = spent = 0.0
        back: list[_Device] = []
        size = 0
        for number in range(BATCHES + 2):  # the first batch has no results and the last no tasks: they are not timed
            fresh = [_Device(encoding, *consortium) for _ in range(BATCH if number <= BATCHES else 0)]
            for device in back:
                device.trained()
            work = [("task", device) for device in fresh] + [("result", device) for device in back]
            random.Random(number).shuffle(work)  # noqa: S311 - an order, not a secret
            taken = _sent(lines, work)
            if 1 <= number <= BATCHES:
                seconds, spent = seconds + taken[0], spent + taken[1]
            for device in back:
                device.check()
                size = len(device.body)
            back = fresh
        ours.send("end")
        counted, peak, used = ours.recv()
        for line in lines:
            line.close()
    finally:
        gateway.join(10)
        if gateway.is_alive():
            gateway.kill()
    updates = BATCHES * BATCH
    assert counted == updates + BATCH, f"{counted} of {updates + BATCH} counted"
    return {
        "updates a second": round(updates / seconds),
        "gateway's peak memory MB": round(peak / 1e6),
        "gateway's CPU ms an update": round(1e3 * used / (updates + BATCH), 3),
        "devices' CPU ms an update, TLS and HTTP alone": round(1e3 * spent / updates, 3),
        "bytes of a result": size,
    }


def _serve(pipe: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _served(pipe, found_edge(Path(folder)))


def _served(pipe: Connection, world: Any) -> None:
    """A gateway of a process for each processor. A job of one version that never ends stands in the parent's place."""
    federation, own = world.federation, world.identity()
    party = Party(lambda: own, federation.charter, world.moment, federation.record, lambda _: None)
    selection = DeviceManagerConfig(device_selection_size=100_000)
    edge = EdgeSettings(max_norm=10.0, models=ModelManagerConfig(max_model_version=2), devices=selection)
    said = {
        "name": world.task.job,
        "recipe": "fedbuff",
        "options": {"recipe": "fedbuff", "edge": edge.model_dump(), "config": dict(world.task.config)},
        "num_rounds": 1,
        "min_clients": 1,
        "train_script": "training.pte",
        "framework": "pytorch",
        "params_type": "DIFF",
        "model": {name: {"dtype": "F32", "shape": shape} for name, shape in SHAPES.items()},
    }
    bundle = make_bundle(Path("/nonexistent-folder"), JobSettings.model_validate(said), {"training.pte": b"graph"})
    offer = Offer(job="job-1", record="", bundle="0" * 64, bundle_size=1)
    version = version_of(1, world.task, model_of(1.0, SHAPES))
    workers = GatewayWorkers(
        party, lambda: world.group_value, lambda: (federation.charter(), federation.store), PROCESSES, FAST
    )
    with workers:
        port = Port("127.0.0.1:0", {"https": workers.take}, tell=lambda _: None)
        job: Any = workers.begin(offer, bundle, world.task)
        reply = Reply({}, 1 << 20, (1,))

        def exchanged(waiting: int = 0) -> int:
            """What a moment's exchange with the parent is to a gateway, without the network."""
            partial = job.report().partial
            if waiting:
                for worker in workers._workers:
                    job._node._deal.report(worker.origins["job-1"], Demand(0, waiting))
            job.hear(reply, {1: version})
            return 0 if partial is None else len(partial.encoded()) and partial.count

        exchanged(1 << 17)  # as if so many devices had asked before: all that come are wanted
        charter, issuing = federation.charter().id, world.issuer_key.private_bytes_raw()
        pipe.send((port.address, charter, world.keys().public, world.issuer.to_json(), issuing))
        counted, ids = 0, _children()
        began = sum(map(_cpu_seconds, ids))
        while not pipe.poll(MOMENT_SECONDS):
            counted += exchanged()
        for _ in range(2):  # the last claims are settled in one, and handed up in the next
            counted += exchanged()
        used = sum(map(_cpu_seconds, ids)) - began
        pipe.send((counted, sum(map(_peak_bytes, ids)), used))
        port.close()


def _children() -> list[int]:
    own = os.getpid()
    stats = {int(one.name): one / "stat" for one in Path("/proc").glob("[0-9]*")}
    return [own, *(pid for pid, stat in stats.items() if stat.exists() and int(_fields(stat)[1]) == own)]


def _cpu_seconds(pid: int) -> float:
    fields = _fields(Path(f"/proc/{pid}/stat"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fields(stat: Path) -> list[str]:
    return stat.read_text().rpartition(")")[2].split()


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


_SIZES: dict[str, tuple[int, int]] = {}
"""Bytes of a request and of its answer, by message, as they were seen last."""


class _Device:
    """A device's messages: everything but the training."""

    def __init__(self, encoding: str, charter: str, group_key: bytes, issuer: dict[str, Any], issuing: bytes) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        known = DeviceIssuer.model_validate(issuer)
        signing, public = Ed25519PrivateKey.from_private_bytes(issuing), self.key.public_key()
        self.token = issue_token(known, signing, charter, public, secrets.token_hex(16), datetime.now(UTC))
        self.charter, self.group_key = charter, group_key
        self.encoding = encoding
        self.asked, self.body = self._request(TaskRequest, "task")
        self.answer = b""

    def trained(self) -> None:
        """Open the task's answer, and make the result."""
        _SIZES["task"] = len(self.body), len(self.answer)
        task = self._opened(TaskAnswer, "task").task
        assert task is not None
        self.asked, self.body = self._request(
            ResultRequest,
            "result",
            _delta(self.encoding),
            version=task.version,
            task=task.digest,
            weight=8.0,
            encoding=self.encoding,
            compressed=False,
            cookie=task.cookie,
        )

    def check(self) -> None:
        """The result was counted."""
        _SIZES["result"] = len(self.body), len(self.answer)
        done = self._opened(ResultAnswer, "result")
        assert (done.status, done.message) == ("OK", "counted"), done

    def _opened(self, kind: Any, message: str) -> Any:
        words = open_answer(self.answer, bytes.fromhex(self.asked.answer_key), self.asked.request)
        return read_words(kind, words, where=message)

    def _request(self, kind: Any, message: Any, tensors: bytes = b"", **words: Any) -> tuple[Any, bytes]:
        common = {"token": self.token, "request": secrets.token_hex(16), "answer_key": secrets.token_hex(32)}
        made = kind(**common, job="job-1", **words)
        sealed = seal_request(
            message, made.to_bytes(), tensors, key=self.key, group_key=self.group_key, charter=self.charter
        )
        return made, sealed


@cache
def _delta(encoding: Any) -> bytes:
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(size=shape).astype("<f4") for name, shape in SHAPES.items()}
    return encode_delta(tensors, encoding, rng, compressed=False)


class _Line:
    """One connection, kept alive. Plain sockets: what a device's own HTTP costs is not the question."""

    def __init__(self, address: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host, _, port = address.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=30)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = context.wrap_socket(plain)

    def call(self, message: str, body: bytes) -> bytes:
        """The body of the answer."""
        head = f"POST /edge/v1/{message} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall(head.encode() + body)
        told = self._socket.recv(1 << 16)
        while b"\r\n\r\n" not in told:
            told += self._more()
        head_of, _, answer = told.partition(b"\r\n\r\n")
        assert head_of.startswith(b"HTTP/1.1 200"), head_of
        length = int(head_of.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(answer) < length:
            answer += self._more()
        return answer

    def _more(self) -> bytes:
        piece = self._socket.recv(1 << 16)
        if not piece:
            raise ConnectionError("the gateway has closed the connection")
        return piece

    def close(self) -> None:
        self._socket.close()


def _sent(lines: list[_Line], work: list[tuple[str, _Device]]) -> tuple[float, float]:
    """Send all of `work`, one thread for each line: seconds on the wall, and of this process's processor time."""
    errors: list[BaseException] = []

    def run(line: _Line) -> None:
        try:
            while work:
                message, device = work.pop()
                device.answer = line.call(message, device.body)
        except (IndexError, OSError, AssertionError) as error:
            if not isinstance(error, IndexError):  # another thread has taken the last
                errors.append(error)

    threads = [threading.Thread(target=run, args=(line,)) for line in lines]
    wall, spent = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - wall, time.process_time() - spent
    if errors:
        raise RuntimeError("the devices were not served") from errors[0]
    return taken
