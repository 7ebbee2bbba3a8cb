"""A gateway as several processes on one port, since Python computes on one processor at a time (docs/adr/0043).

This process has the guest's credential, the port up to the hello, and the tree's link. It hands connections to workers
in turn; each is a gateway of its own to the tree, and this process the inner node above them. A worker that dies costs
its unsent sums and its connections, and is started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from attestation.canonical import b64
from fl.edge.branch import TreeBranch, bounds_of
from fl.edge.child import NodeJob
from fl.edge.contract import EdgeJob, ModelVersion
from fl.edge.exchange import InnerNode, Reply, Report
from fl.edge.gateway import Pace
from fl.edge.gateway_service import CharterStore
from fl.edge.permits import Demand
from fl.edge.task import DeviceTask
from fl.edge.tree_frames import Offer
from fl.edge.wire import decode_report, encode_duplicates, max_report
from fl.edge.worker_frames import (
    FROM_WORKER,
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
from fl.jobs.bundle import Bundle
from fl.jobs.settings import FedBuffOptions
from fl.party import Party
from fl.server.certificates import ServerCertificates
from policies.errors import Refused

LOOK_SECONDS: Final = 1.0
"""Between two looks at the credential, the charter, the group key, and whether the workers live."""
SAY_SECONDS: Final = 1.0
"""How long the link waits for workers' reports; those of a slower one go up with the next."""
START_SECONDS: Final = 60.0
_SEND_SECONDS: Final = 20
_END_SECONDS: Final = 10.0
_BOOTSTRAP: Final = (
    "import sys; sys.path[:] = sys.argv[3:]; from fl.edge.gateway_worker import main; "
    "main(int(sys.argv[1]), int(sys.argv[2]))"
)
_Frame = Standing | Begun | Ended | Say | Version | Answered


class _Process:
    """A worker process, and the two sockets to it."""

    def __init__(self) -> None:
        self._control, control = socket.socketpair()
        self._connections, connections = socket.socketpair()
        with control, connections:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOTSTRAP, str(control.fileno()), str(connections.fileno()), *sys.path],
                pass_fds=(control.fileno(), connections.fileno()),
                stdin=subprocess.DEVNULL,
            )
        limit = struct.pack("ll", _SEND_SECONDS, 0)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._connections.setblocking(False)
        self._sending = threading.Lock()
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.versions: dict[str, dict[int, str]] = {}
        """The digests of the models that it has, by job and version."""
        self.origins: dict[str, str] = {}
        """Its start, by job."""

    def say(self, frame: _Frame, body: bytes = b"") -> None:
        """Send a frame; a worker that does not take it is ended."""
        try:
            with self._sending:
                send(self._control, frame, body)
        except OSError:
            self.end()

    def hand(self, connection: socket.socket) -> None:
        """Hand a connection on. Raises OSError."""
        socket.send_fds(self._connections, [b"c"], [connection.fileno()])
        connection.close()

    def listen(self, hear: Callable[[_Process, Told | Line, bytes], None], most: Callable[[], int]) -> None:
        """Hear what it says until it ends. Raises MalformedMessage."""
        try:
            while True:
                frame, body = receive(self._control, FROM_WORKER, most=most())
                if isinstance(frame, Ready):
                    self.ready.set()
                else:
                    hear(self, frame, body)
        except (PeerLost, OSError):
            return
        finally:
            self.end()

    def end(self) -> None:
        """End it: its end of the sockets tells it to; a moment later it is killed."""
        if self.ended.is_set():
            return
        self.ended.set()
        for one in (self._control, self._connections):
            with contextlib.suppress(OSError):  # it may be gone
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Wait for its end, and let go of it."""
        self.end()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._control.close()
        self._connections.close()


class _SharedJob:
    """One job: an inner node to the workers, a gateway to the parent (`fl.edge.child.NodeJob`)."""

    def __init__(
        self, begun: Begun, graph: bytes, bundle: Bundle, strategy: str, workers: Callable[[], list[_Process]]
    ) -> None:
        self.begun, self.graph = begun, graph
        branch = TreeBranch(EdgeJob(begun.job, begun.name, "edge"), bundle.settings.schema_of_model, _origin(), _never)
        self.schema = branch.schema
        self._node = InnerNode(branch, strategy, np.random.default_rng(int.from_bytes(os.urandom(8), "big")))
        self._workers = workers
        self._changed = threading.Condition()
        self._waiting: dict[_Process, tuple[Report, int]] = {}  # reports to be answered, and in which of ours they are
        self._built = 0

    def told(self, worker: _Process, report: Report) -> None:
        """A worker's report; it is answered when the parent has answered ours."""
        with self._changed:
            self._node.take(report)
            self._waiting[worker] = (report, self._built + 1)
            self._changed.notify_all()

    def drop(self, worker: _Process) -> None:
        """A worker has ended."""
        with self._changed:
            self._waiting.pop(worker, None)
            if (origin := worker.origins.get(self.begun.job)) is not None:
                self._node.drop(origin)

    def report(self) -> Report:
        """What to say to the parent next: what the workers say now."""
        workers = self._workers()
        for worker in workers:
            worker.say(Say())
        with self._changed:
            self._changed.wait_for(
                lambda: all(worker in self._waiting or worker.ended.is_set() for worker in workers), SAY_SECONDS
            )
            self._built += 1
            return self._node.report()

    def hear(self, reply: Reply, versions: Mapping[int, ModelVersion]) -> None:
        """The parent's reply, which is the workers' too."""
        with self._changed:
            self._node.hear(reply, versions)
            answered = [(worker, report) for worker, (report, due) in self._waiting.items() if due <= self._built]
            for worker, _ in answered:
                del self._waiting[worker]
            replies = [(worker, self._node.reply_to(report, reply.duplicates)) for worker, report in answered]
        job = self.begun.job
        for worker, own in replies:
            known = worker.versions.setdefault(job, {})
            for number in own.alive:
                one = versions[number]
                if known.get(number) != one.digest:
                    worker.say(Version(job=job, version=number, digest=one.digest, task=one.task), one.model)
            worker.versions[job] = {number: versions[number].digest for number in own.alive}
            body = encode_duplicates(own.duplicates)
            worker.say(Answered(job=job, granted=own.granted, alive=own.alive, over=own.over), body)


class GatewayWorkers:
    """The workers of a gateway, and its jobs (`fl.edge.child.Node`). A context: leaving it ends them."""

    def __init__(
        self,
        party: Party,
        group_key: Callable[[], bytes],
        store: CharterStore,
        number: int,
        pace: Pace,
    ) -> None:
        self._party = party
        self._certificates = ServerCertificates(party)
        self._group_key = group_key
        self._store = store
        self._number = number
        self._pace = pace
        self._jobs: dict[str, _SharedJob] = {}
        self._lock = threading.Lock()
        self._workers: list[_Process] = []
        self._listening: dict[_Process, threading.Thread] = {}
        self._turn = count()
        self._said: tuple[Standing, Mapping[str, bytes]] | None = None
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, name="gateway's workers", daemon=True)

    def __enter__(self) -> GatewayWorkers:
        """Start them. Raises PeerLost if they do not."""
        self._said = self._standing()
        for _ in range(self._number):
            self._start()
        ends = time.monotonic() + START_SECONDS
        if not all(worker.ready.wait(max(0.0, ends - time.monotonic())) for worker in self._workers):
            self.__exit__()
            raise PeerLost("a worker process of the gateway did not start", where="gateway")
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self._over.set()
        if self._looking.is_alive():
            self._looking.join(_END_SECONDS)
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.close()
            self._listening[worker].join(_END_SECONDS)

    def take(self, connection: socket.socket) -> None:
        """Hand a connection to the worker whose turn it is (`fl.transport.port`). Raises OSError if none can."""
        workers = [worker for worker in self._workers if worker.ready.is_set() and not worker.ended.is_set()]
        if not workers:
            raise ConnectionAbortedError("no worker runs")
        workers[next(self._turn) % len(workers)].hand(connection)

    # --- the tree -----------------------------------------------------------------------------------------------------

    def begin(self, offer: Offer, bundle: Bundle, task: DeviceTask) -> NodeJob:
        """A job that was checked begins here."""
        settings, options = bundle.settings, bundle.settings.options
        if not isinstance(options, FedBuffOptions):
            raise TypeError("only an edge job has devices")
        edge = options.edge
        bounds = bounds_of(edge)
        begun = Begun(
            job=offer.job,
            name=settings.name,
            method="edge",
            config=dict(options.config),
            max_norm=bounds.max_norm,
            max_weight=bounds.max_weight,
            device_reuse=edge.devices.device_reuse,
            task_config=dict(task.config),
            task_seconds=edge.task_seconds,
            tensors={name: (spec.dtype, spec.shape) for name, spec in settings.schema_of_model.items()},
        )
        job = _SharedJob(begun, task.graph, bundle, edge.devices.device_sampling_strategy, self._alive)
        with self._lock:
            self._jobs[offer.job] = job
            workers = self._alive()
        for worker in workers:
            worker.say(begun, task.graph)
        return job

    def end(self, job: str) -> None:
        """A job is over."""
        with self._lock:
            self._jobs.pop(job, None)
        for worker in self._alive():
            worker.say(Ended(job=job))
            worker.versions.pop(job, None)

    def _alive(self) -> list[_Process]:
        return [worker for worker in self._workers if not worker.ended.is_set()]

    # --- workers ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._said is None:
            raise TypeError("nothing is known of the gateway")
        worker = _Process()
        standing, files = self._said
        worker.say(standing, _packed(files))
        with self._lock:
            for job in self._jobs.values():
                worker.say(job.begun, job.graph)
            self._workers = [*self._workers, worker]
        thread = self._listening[worker] = threading.Thread(
            target=self._listen, args=(worker,), name="worker", daemon=True
        )
        thread.start()

    def _listen(self, worker: _Process) -> None:
        try:
            worker.listen(self._hear, self._most)
        except MalformedMessage as error:
            self._party.tell(f"a worker of the gateway was ended: {error.what}")

    def _most(self) -> int:
        return max((max_report(job.schema) for job in list(self._jobs.values())), default=0)

    def _hear(self, worker: _Process, frame: Told | Line, body: bytes) -> None:
        if isinstance(frame, Line):
            self._party.tell(frame.text)
            return
        job = self._jobs.get(frame.job)
        if job is None:
            return  # it ended meanwhile
        if worker.origins.setdefault(frame.job, frame.origin) != frame.origin:
            raise MalformedMessage("a worker reports as another", where="gateway's worker")
        demand = Demand(frame.returned, frame.waiting)
        report = decode_report(body, frame.origin, demand, job.schema, where="gateway's worker")
        if set(report.claims) - {frame.origin} or (report.partial and report.partial.origin != frame.origin):
            raise MalformedMessage("a worker reports for another", where="gateway's worker")
        job.told(worker, report)

    def _look(self) -> None:
        """Tell workers what is new of the gateway, and start those again that have ended."""
        while not self._over.wait(LOOK_SECONDS):
            said, before = self._standing(), self._said
            self._said = said
            ended = [worker for worker in self._workers if worker.ended.is_set()]
            if before is None or _lasting(said[0]) != _lasting(before[0]) or said[1] is not before[1]:
                files = b"" if before is not None and said[1] is before[1] else _packed(said[1])
                for worker in self._alive():
                    worker.say(said[0], files)
            for worker in ended:
                for job in list(self._jobs.values()):
                    job.drop(worker)
                with self._lock:
                    self._workers = [one for one in self._workers if one is not worker]
                worker.close()
                self._listening.pop(worker).join(_END_SECONDS)
                self._party.tell("a worker of the gateway has ended; what it had not handed up is lost")
                self._start()

    def _standing(self) -> tuple[Standing, Mapping[str, bytes]]:
        credentials = self._certificates.current()
        try:
            identity = self._party.identity()
            role, name, ears, ends = identity.role, identity.name, identity.ears, identity.lease_ends.timestamp()
            sign = identity.sign_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()
        except Refused:  # no lease now
            if self._said is None:
                raise
            before = self._said[0]
            role, name, ears, ends, sign = before.role, before.name, (), 0.0, before.sign_key
        standing = Standing(
            role=role,
            name=name,
            sign_key=sign,
            tls_key=credentials.key,
            chain=credentials.chain,
            trusted=credentials.trusted,
            ears=ears,
            lease_ends=ends,
            group_key=self._group_key().hex(),
            at=self._party.clock().timestamp(),
            mark=time.monotonic(),
            pace=(self._pace.no_job, self._pace.task, self._pace.again),
            workers=self._number,
        )
        return standing, self._store()[1]


def _lasting(standing: Standing) -> Standing:
    """What is news if it changes: a clock runs on by itself."""
    return standing.model_copy(update={"at": 0.0, "mark": 0.0})


def _packed(files: Mapping[str, bytes]) -> bytes:
    return json.dumps({name: b64(raw) for name, raw in files.items()}).encode()


def _origin() -> str:
    return os.urandom(16).hex()


def _never() -> float:
    return 0.0
