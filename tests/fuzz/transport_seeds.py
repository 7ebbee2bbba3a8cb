"""Good input of each target of transport, as the parts themselves write it."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import numpy as np

from fl.model import tensors_of
from fl.tensors import encode
from fl.transport.frames import Lease, Left, Logged, Ready, Train, pack
from fl.transport.records import end_record


def _hellos() -> list[bytes]:
    found = []
    for protocols in (["h2"], ["http/1.1"], ["h2", "http/1.1"]):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(protocols)
        outgoing = ssl.MemoryBIO()
        try:
            context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="hub").do_handshake()
        except ssl.SSLWantReadError:
            found.append(outgoing.read())
    return found


def _frames() -> list[bytes]:
    return [
        pack(Lease(ears=("a.b.c",))),
        pack(Ready(job="job-1")),
        pack(Left(job="job-1", reasons=("it ended",))),
        pack(Logged(job="job-1", key="loss", value=0.5, step=3)),
        pack(Train(job="job-1", round=0, total_rounds=2, model_sha256="0" * 64, model_size=10)),
        end_record("OK", "")[4:],
    ]


def _tensors() -> list[bytes]:
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([1, 2], dtype=np.int64)}
    return [encode(tensors_of(weights)), encode({})]


SEEDS: dict[str, Callable[[], list[bytes]]] = {"client-hello": _hellos, "frame": _frames, "tensors": _tensors}
"""Seeds by target."""
