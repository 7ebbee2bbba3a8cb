"""What limits a gateway on this machine: TLS with bodies of its sizes alone, and an update's cryptography alone."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import ssl
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from attestation.hybrid import HybridPrivateKey, seal

TIMES = 300


class Served:
    """Bare services, one in each of some processes: whoever sends a body is answered as many bytes as it was told for
    bodies of that size. `addresses`: where they listen."""

    def __init__(self, credentials: tuple[str, str, str], answers: dict[int, int], processes: int) -> None:
        """`credentials`: key, chain, trusted certificates; `answers`: an answer's bytes by its request's."""
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, credentials, answers))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.addresses = [f"127.0.0.1:{pipe.recv()}" for pipe in self._pipes]

    def close(self) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.send("end")
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection, credentials: tuple[str, str, str], answers: dict[int, int]) -> None:
    from fl.transport.tls import server_context

    uvloop.run(_served(pipe, server_context(*credentials, strangers=True), answers))


async def _served(pipe: Connection, tls: ssl.SSLContext, answers: dict[int, int]) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Bare(answers), "127.0.0.1", 0, ssl=tls)
    pipe.send(server.sockets[0].getsockname()[1])
    over = asyncio.Event()
    loop.add_reader(pipe.fileno(), over.set)
    await over.wait()
    server.close()


class _Bare(asyncio.Protocol):
    """Reads a head for its length alone, and the body for nothing."""

    def __init__(self, answers: dict[int, int]) -> None:
        self._answers = answers
        self._read = bytearray()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, end, _ = self._read.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        if len(self._read) == len(head) + 4 + length:
            self._read.clear()
            answer = bytes(self._answers[length])
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)


def cryptography_ms(sizes: Sequence[int]) -> float:
    """Milliseconds of one core for what a gateway has to open and verify of one update whose sealed messages have these
    bytes: each one's HPKE and P-256 signature, its answer's AES-GCM, and the token's Ed25519 signature once."""
    key, device, issuer = (
        HybridPrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
        Ed25519PrivateKey.generate(),
    )
    contents = [os.urandom(size) for size in sizes]
    sealed = [seal(content, key.public_bytes(), info=b"bench") for content in contents]
    by = ec.ECDSA(hashes.SHA256())
    signatures = [device.sign(content, by) for content in contents]
    token, answer = os.urandom(500), AESGCM(os.urandom(32))
    signed = issuer.sign(token)
    of_device, of_issuer = device.public_key(), issuer.public_key()
    began = time.process_time()
    for _ in range(TIMES):
        for body, content, signature in zip(sealed, contents, signatures, strict=True):
            key.open(body, info=b"bench")
            of_device.verify(signature, content, by)
            answer.encrypt(os.urandom(12), content[:1500], b"")
        of_issuer.verify(signed, token)
    return 1e3 * (time.process_time() - began) / TIMES
