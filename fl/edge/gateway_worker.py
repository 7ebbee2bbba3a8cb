"""One of a gateway's worker processes: devices' service, and branches whose parent is the process above.

It has the credential's TLS and signing keys, the group key and the charter, and nothing else of the guest. When the
process above ends, so does it. See `fl.edge.gateway_workers`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.canonical import unb64
from attestation.errors import LeaseEnded
from fl.edge.branch import HELD_BYTES, TreeBranch
from fl.edge.contract import Branch, EdgeJob, ModelVersion, UpdateBounds
from fl.edge.exchange import Reply, Report
from fl.edge.gateway import Gateway, Pace
from fl.edge.gateway_service import GatewayService
from fl.edge.gateway_tree import GuardedBranch
from fl.edge.masks import capabilities_of
from fl.edge.sealing import GroupKeys
from fl.edge.task import DeviceTask
from fl.edge.wire import decode_duplicates, encode_report
from fl.edge.worker_frames import (
    FROM_ABOVE,
    MAX_BODY,
    Answered,
    Begun,
    Ended,
    Line,
    Ready,
    Say,
    Standing,
    Told,
    Version,
    receive,
    send,
)
from fl.errors import MalformedMessage, PeerLost
from fl.server.certificates import TlsContexts, TlsCredentials
from fl.tensors import TensorSpec
from policies.charter import load_charter

if TYPE_CHECKING:
    from policies.charter import Charter

ROOT: Final = "metadata/1.root.json"
_STOP_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Introducer:
    """What a proof says of the gateway (`attestation.introduction.Introducing`)."""

    role: str
    name: str
    sign_key: Ed25519PrivateKey = field(repr=False)
    ears: tuple[str, ...]


class _Now:
    """What the process above has said of the gateway last. Set by one thread, read by others."""

    def __init__(self, said: Standing, store: bytes) -> None:
        self.said = said
        self.files: Mapping[str, bytes] = {}
        self._take_charter(store)
        self.keys = GroupKeys.parse(bytes.fromhex(said.group_key), self.charter().id)
        self._take_names()

    def take(self, said: Standing, store: bytes) -> None:
        """It has said something new."""
        before, self.said = self.said, said
        if store:
            self._take_charter(store)
        if said.group_key != before.group_key:
            self.keys = GroupKeys.parse(bytes.fromhex(said.group_key), self.charter().id)
        self._take_names()

    def _take_charter(self, store: bytes) -> None:
        self.files = {name: unb64(text, where=name) for name, text in json.loads(store).items()}
        self._charter = load_charter(self.files, self.files[ROOT], self.clock())

    def _take_names(self) -> None:
        said = self.said
        self._introducer = _Introducer(
            said.role, said.name, Ed25519PrivateKey.from_private_bytes(bytes.fromhex(said.sign_key)), said.ears
        )
        self._credentials = TlsCredentials(said.tls_key, said.chain, said.trusted)

    def charter(self) -> Charter:
        """The charter that the guest follows."""
        return self._charter

    def store(self) -> tuple[Charter, Mapping[str, bytes]]:
        """The same, and its files."""
        return self._charter, self.files

    def clock(self) -> datetime:
        """The guest's time."""
        return datetime.fromtimestamp(self.said.at + time.monotonic() - self.said.mark, UTC)

    def group_keys(self) -> GroupKeys:
        """The group's keys."""
        return self.keys

    def identity(self) -> _Introducer:
        """Who the gateway is. Raises LeaseEnded."""
        if not self.said.ears or self.clock().timestamp() >= self.said.lease_ends:
            raise LeaseEnded("gateway")
        return self._introducer

    def current(self) -> TlsCredentials:
        """What TLS shows (`fl.server.certificates.Certificates`)."""
        return self._credentials


class _Job:
    """A job, and whether its last report was answered."""

    def __init__(self, branch: GuardedBranch) -> None:
        self.branch = branch
        self.versions: dict[int, ModelVersion] = {}
        self.asked: Report | None = None


class Worker:
    """Serves until the process above ends."""

    def __init__(self, control: socket.socket, connections: socket.socket) -> None:
        """Hear first who the gateway is. Raises MalformedMessage for what the process above does not say."""
        self._control = control
        self._connections = connections
        self._jobs: dict[str, _Job] = {}
        self._branches: Mapping[str, Branch] = {}
        self._loop = uvloop.new_event_loop()
        self._sending = threading.Lock()
        said, store = receive(control, FROM_ABOVE, most=MAX_BODY)
        if not isinstance(said, Standing):
            raise MalformedMessage(f"{said.kind!r} came first", where="gateway")
        now = self._now = _Now(said, store)
        self._held = HELD_BYTES // said.workers
        gateway = Gateway(
            now.group_keys, now.charter, now.identity, now.clock, lambda: self._branches, Pace(*said.pace)
        )
        tls = TlsContexts(now, strangers=True).switching()
        self._service = GatewayService(gateway, now.store, tls, self._tell, share=said.workers)

    def run(self) -> None:
        """Serve. Raises MalformedMessage for what the process above does not say."""
        thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        thread.start()
        self._in_loop(self._open())
        self._send(Ready())
        try:
            while True:
                frame, body = receive(self._control, FROM_ABOVE, most=MAX_BODY)
                self._hear(frame, body)
        except PeerLost:
            return  # the gateway ends
        finally:
            self._in_loop(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(_STOP_SECONDS)

    async def _open(self) -> None:
        self._service.open()
        self._connections.setblocking(False)
        self._loop.add_reader(self._connections.fileno(), self._take)

    async def _close(self) -> None:
        self._loop.remove_reader(self._connections.fileno())
        await self._service.stop()

    def _in_loop(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_STOP_SECONDS)  # type: ignore[arg-type]

    def _take(self) -> None:
        """The process above hands a connection on."""
        try:
            said, descriptors, _, _ = socket.recv_fds(self._connections, 1, 1)
        except BlockingIOError:
            return
        for descriptor in descriptors:
            self._service.take(socket.socket(fileno=descriptor))
        if not said:
            self._loop.remove_reader(self._connections.fileno())

    def _hear(self, frame: Standing | Begun | Ended | Say | Version | Answered, body: bytes) -> None:
        if isinstance(frame, Standing):
            self._now.take(frame, body)
        elif isinstance(frame, Begun):
            self._jobs[frame.job] = _Job(self._branch(frame, body))
            self._branches = {name: job.branch for name, job in self._jobs.items()}
        elif isinstance(frame, Say):
            self._report()
        elif isinstance(frame, Ended):
            self._jobs.pop(frame.job, None)
            self._branches = {name: job.branch for name, job in self._jobs.items()}
            self._changed()
        elif (job := self._jobs.get(frame.job)) is None:
            return
        elif isinstance(frame, Version):
            job.versions[frame.version] = ModelVersion(frame.version, frame.digest, body, frame.task)
        else:
            job.asked = None
            job.versions = {number: job.versions[number] for number in frame.alive}
            duplicates = decode_duplicates(body, where="gateway")
            job.branch.hear(Reply(duplicates, frame.granted, frame.alive, frame.over), job.versions)

    def _branch(self, begun: Begun, graph: bytes) -> GuardedBranch:
        bounds = UpdateBounds(begun.max_norm, begun.max_weight)
        able = capabilities_of(begun.task_config)
        job = EdgeJob(begun.job, begun.name, begun.method, begun.config, able, bounds, begun.device_reuse)
        schema = {name: TensorSpec(dtype, shape) for name, (dtype, shape) in begun.tensors.items()}
        task = DeviceTask(begun.name, "executorch", graph, begun.task_config)
        branch = TreeBranch(
            job,
            schema,
            os.urandom(16).hex(),
            time.monotonic,
            held_bytes=self._held,
            task_seconds=begun.task_seconds,
        )
        branch.advance([], {task.digest: task})
        return GuardedBranch(branch, self._changed)

    def _report(self) -> None:
        for name, job in self._jobs.items():
            if job.asked is not None:
                continue
            report = job.asked = job.branch.report()
            demand = report.demand
            head = Told(job=name, origin=report.origin, returned=demand.returned, waiting=demand.waiting)
            self._send(head, encode_report(report))

    def _send(self, frame: Told | Ready | Line, body: bytes = b"") -> None:
        with self._sending:
            send(self._control, frame, body)

    def _changed(self) -> None:
        self._loop.call_soon_threadsafe(self._service.news)

    def _tell(self, line: str) -> None:
        self._send(Line(text=line[:1000]))


def main(control: int, connections: int) -> None:
    """Serve with these two sockets of the process above."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Worker(socket.socket(fileno=control), socket.socket(fileno=connections)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
