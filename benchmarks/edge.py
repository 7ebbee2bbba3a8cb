"""Device updates a second through one gateway over TLS: each a request for a task and a result of a 100 KB model.

The gateway is a process of its own; this process is all devices, over CONNECTIONS kept alive. Every update is another
device's first: its token and signature are checked, its request is opened, its result is opened, decoded, appraised
(finite, of the model, weight, norm) and folded. Devices' own work (sealing, signing, TLS) is in the same figure, since
both share this machine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import secrets
import ssl
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

sys.path.append(str(Path(__file__).parents[1] / "tests/fl"))

UPDATES = 6000
WARM = 500
CONNECTIONS = 32
SHAPES = {"a.weight": (250, 96), "a.bias": (250,), "b.weight": (3, 250)}
"""25,000 numbers: 100 KB as float32."""


def measure() -> Mapping[str, object]:
    """Updates a second by encoding, and the most memory that the gateway had."""
    return {encoding: _measured(encoding) for encoding in ("f32", "bf16", "int8")}


def _measured(encoding: str) -> Mapping[str, object]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gateway = context.Process(target=_serve, args=(theirs,), daemon=True)
    gateway.start()
    theirs.close()
    try:
        if not ours.poll(60):
            raise RuntimeError("the gateway does not start")
        address, *consortium = ours.recv()
        devices = [_Device(encoding, *consortium) for _ in range(UPDATES + WARM)]
        uvloop.run(_load(address, devices[:WARM]))
        before, cpu = time.perf_counter(), time.process_time()
        uvloop.run(_load(address, devices[WARM:]))
        seconds, spent = time.perf_counter() - before, time.process_time() - cpu
        ours.send("end")
        counted, peak, used = ours.recv()
    finally:
        gateway.join(10)
        if gateway.is_alive():
            gateway.kill()
    assert counted == UPDATES + WARM, f"{counted} of {UPDATES + WARM} counted"
    return {
        "updates a second": round(UPDATES / seconds),
        "gateway's peak memory MB": round(peak / 1e6),
        "gateway's CPU ms an update": round(1e3 * used / (UPDATES + WARM), 3),
        "devices' CPU ms an update": round(1e3 * spent / UPDATES, 3),
        "bytes of an update": devices[0].size,
    }


def _serve(pipe: Connection) -> None:
    from edge_world import found_edge

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(_served(pipe, found_edge(Path(folder))))


async def _served(pipe: Connection, world: Any) -> None:
    from fl.edge.gateway_service import GatewayService
    from fl.transport.tls import server_context

    branch = world.branch(shapes=SHAPES, max_norm=10.0)
    gateway = world.gateway(branch)
    own = gateway.identity()
    tls = server_context(own.tls_key_pem, own.certificate_pem, world.federation.issuer.certificate_pem, strangers=True)
    service = GatewayService(gateway, lambda: (world.federation.charter(), world.federation.store), tls)
    await service.start("127.0.0.1:0")
    charter, issuing = world.federation.charter().id, world.issuer_key.private_bytes_raw()
    pipe.send((service.address, charter, world.keys().public, world.issuer.to_json(), issuing))
    counted, began = 0, time.process_time()
    while not pipe.poll():
        await asyncio.sleep(0.05)
        counted += _exchanged(branch)
    counted += _exchanged(branch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((counted, peak, time.process_time() - began))
    await service.stop()


def _exchanged(branch: Any) -> int:
    """What a moment's exchange with the parent is to a gateway, without the network."""
    branch.claims()
    branch.settle(())
    partial = branch.take()
    return 0 if partial is None else len(partial.encoded()) and partial.count


class _Device:
    """A device's messages: everything but the training."""

    def __init__(self, encoding: str, charter: str, group_key: bytes, issuer: dict[str, Any], issuing: bytes) -> None:
        from fl.edge.deltas import encode_delta
        from fl.edge.tokens import issue_token
        from policies.devices import DeviceIssuer

        self.key = ec.generate_private_key(ec.SECP256R1())
        known = DeviceIssuer.model_validate(issuer)
        signing, public = Ed25519PrivateKey.from_private_bytes(issuing), self.key.public_key()
        self.token = issue_token(known, signing, charter, public, secrets.token_hex(16), datetime.now(UTC))
        self.charter, self.group_key = charter, group_key
        self.encoding = encoding
        rng = np.random.default_rng(1)
        if not _DELTAS.get(encoding):
            tensors = {name: rng.normal(size=shape).astype("<f4") for name, shape in SHAPES.items()}
            _DELTAS[encoding] = encode_delta(tensors, encoding, rng, compressed=False)  # type: ignore[arg-type]
        self.size = len(_DELTAS[encoding])

    def request(self, kind: Any, message: Any, tensors: bytes = b"", **words: Any) -> tuple[Any, bytes]:
        from fl.edge.sealing import seal_request

        common = {"token": self.token, "request": secrets.token_hex(16), "answer_key": secrets.token_hex(32)}
        made = kind(**common, job="job-1", **words)
        sealed = seal_request(
            message, made.to_bytes(), tensors, key=self.key, group_key=self.group_key, charter=self.charter
        )
        return made, sealed


_DELTAS: dict[str, bytes] = {}


async def _load(address: str, devices: list[_Device]) -> None:
    """All `devices` report once, over CONNECTIONS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    waiting = list(devices)

    async def work() -> None:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, limit=1 << 20)
        while waiting:
            await _update(reader, writer, waiting.pop())
        writer.close()

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))


async def _update(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, device: _Device) -> None:
    from fl.edge.messages import ResultAnswer, ResultRequest, TaskAnswer, TaskRequest

    asked, sealed = device.request(TaskRequest, "task")
    answer = await _called(reader, writer, "task", sealed, asked, TaskAnswer)
    task = answer.task
    assert task is not None, answer
    told, sealed = device.request(
        ResultRequest,
        "result",
        _DELTAS[device.encoding],
        version=task.version,
        task=task.digest,
        weight=8.0,
        encoding=device.encoding,
        compressed=False,
        cookie=task.cookie,
    )
    done = await _called(reader, writer, "result", sealed, told, ResultAnswer)
    assert done.status == "OK", done


async def _called(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: str, sealed: bytes, asked: Any, kind: Any
) -> Any:
    from fl.edge.messages import read_words
    from fl.edge.sealing import open_answer

    head = f"POST /edge/v1/{message} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(sealed)}\r\n\r\n"
    writer.write(head.encode() + sealed)
    await writer.drain()
    told = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert told.startswith(b"http/1.1 200"), told
    length = int(told.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    return read_words(kind, open_answer(body, bytes.fromhex(asked.answer_key), asked.request), where=message)
