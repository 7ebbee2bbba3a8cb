"""The child's end of the tree: a gateway's or an inner node's connection to its parent, for as long as the guest lives.

Every moment it looks which jobs run, checks each one's record and bundle by the charter, as a site does, and exchanges
reports. A report is sent until it is answered, over as many connections as that takes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Final, Protocol

from attestation.errors import LeaseEnded, PeerLapsed
from fl.edge.contract import ModelVersion
from fl.edge.exchange import Reply, Report
from fl.edge.task import DeviceTask
from fl.edge.tree_frames import FROM_PARENT, Look, Offer, Offered, Replied, Reported, received
from fl.edge.wire import decode_duplicates, encode_report
from fl.errors import ApprovalRefused, CallFailed, LeaseLapsed, MalformedMessage, PeerLost, RoundOver
from fl.guard.approval import approve, read_record
from fl.jobs.bundle import MAX_BUNDLE, Bundle, parse_bundle
from fl.jobs.settings import FedBuffOptions
from fl.party import Party
from fl.transport.channel import ServerConnection, connect, peer_error
from fl.transport.chunks import serve_chunks
from fl.transport.frames import Fetch, pack, unpack
from fl.transport.lease import OwnLease
from fl.transport.route import Route
from policies.documents import Role

MOMENT_SECONDS: Final = 0.5
"""Between two exchanges, unless a job's `update_timeout` is shorter."""
ANSWER_SECONDS: Final = 30.0
FETCH_SECONDS: Final = 600.0
FIRST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 5.0


class NodeJob(Protocol):
    """One job at this node. Called from the link's thread alone."""

    def report(self) -> Report:
        """What to say to the parent next; only after the last one was answered."""

    def hear(self, reply: Reply, versions: Mapping[int, ModelVersion]) -> None:
        """The parent's reply."""


class Node(Protocol):
    """What a gateway or an inner node does with jobs. Called from the link's thread alone."""

    def begin(self, offer: Offer, bundle: Bundle, task: DeviceTask) -> NodeJob:
        """A job that was checked begins here."""

    def end(self, job: str) -> None:
        """A job is over, or its parent has it no more."""


class TreeLink:
    """The connection of a node to its parent. `run` lives until `stop`."""

    def __init__(
        self, party: Party, node: Node, *, parent: Route, parent_name: str, moment: float = MOMENT_SECONDS
    ) -> None:
        self._party = party
        self._node = node
        self._parent = parent
        self._parent_name = parent_name
        self._moment = moment
        self._jobs: dict[str, _Job] = {}
        self._refused: dict[str, str] = {}

    def run(
        self, stop: threading.Event, *, patience: float = 300.0, connected: Callable[[], None] = lambda: None
    ) -> None:
        """Stay connected until `stop`; `connected` is called at each connection.

        Raises PeerRefused if what answers is not the attested parent, PeerLost without a connection for `patience`
        seconds; a lease that has ended, on either side, is waited for as long.
        """
        ends, pause = time.monotonic() + patience, FIRST_PAUSE
        while not stop.is_set():
            try:
                for _ in self._moments(stop):
                    if ends != float("inf"):
                        connected()
                    ends, pause = float("inf"), FIRST_PAUSE
            except (PeerLapsed, LeaseLapsed, LeaseEnded, PeerLost, RoundOver, MalformedMessage) as error:
                if stop.is_set():
                    return
                if ends == float("inf"):
                    ends = time.monotonic() + patience
                self._party.tell(f"parent {self._parent_name}: {error.what}")
                if time.monotonic() + pause > ends:
                    raise
            stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _moments(self, stop: threading.Event) -> Iterator[None]:
        """Connect, and exchange every moment; yields after each. Raises what ends the connection."""
        identity = self._party.identity()
        with connect(
            self._parent,
            server=self._parent_name,
            tls_key=identity.tls_key_pem,
            certificate_pem=identity.certificate_pem,
            charter=self._party.charter,
            clock=self._party.clock,
            here=(_role(identity.role), identity.name),
            roles=("server", "inner"),
        ) as connection:
            talk = _Talk(self._party, connection)
            try:
                while not stop.is_set():
                    self._exchange_all(talk)
                    yield
                    stop.wait(min([self._moment, *(job.update_timeout for job in self._jobs.values())]))
            except CallFailed as error:
                raise peer_error(error, where=talk.where) from error
            finally:
                talk.close()

    def _exchange_all(self, talk: _Talk) -> None:
        offers = {offer.job: offer for offer in talk.look()}
        for job_id, running in list(self._jobs.items()):
            if offers.get(job_id) == running.offer:
                continue
            del self._jobs[job_id]
            self._node.end(job_id)
        for job_id, offer in offers.items():
            job = self._jobs.get(job_id) or self._begun(talk, offer)
            if job is None:
                continue
            if job.pending is None:
                job.pending = job.node.report()
            reply, versions = talk.exchange(job_id, job.pending, job.versions, job.task.digest)
            job.pending, job.versions = None, versions
            job.node.hear(reply, versions)

    def _begun(self, talk: _Talk, offer: Offer) -> _Job | None:
        """A job that is new here, if it may run here; why not is told once."""
        if offer.job in self._refused:
            return None
        try:
            job = self._checked(talk, offer)
        except (ApprovalRefused, MalformedMessage) as error:
            self._refused[offer.job] = error.what
            self._party.tell(f"job {offer.job} is not taken: {error.what}")
            return None
        self._jobs[offer.job] = job
        return job

    def _checked(self, talk: _Talk, offer: Offer) -> _Job:
        charter, identity = self._party.charter(), self._party.identity()
        signed = read_record(offer.record, charter)
        if signed.record.job != offer.job or offer.bundle_size > MAX_BUNDLE:
            raise ApprovalRefused(offer.job, ("what is offered is not what its record says",))
        raw = talk.fetch(Fetch(job=offer.job, what="bundle", sha256=offer.bundle, offset=0), offer.bundle_size)
        bundle = parse_bundle(raw)
        approve(
            signed,
            bundle,
            charter,
            self._party.clock(),
            server=signed.record.server,
            site=identity.name,
            role=_role(identity.role),
            received=signed.record.created_at,
        )
        options = bundle.settings.options
        if not isinstance(options, FedBuffOptions):
            raise ApprovalRefused(offer.job, ("it is no edge job",))
        task = DeviceTask.of(bundle)
        self._party.record("job", {"event": "taken", "job": offer.job, "record": offer.record})
        return _Job(offer, self._node.begin(offer, bundle, task), task, options.edge.models.update_timeout)


class _Job:
    """A job of which reports go up."""

    def __init__(self, offer: Offer, node: NodeJob, task: DeviceTask, update_timeout: float) -> None:
        self.offer = offer
        self.node = node
        self.task = task
        self.update_timeout = update_timeout
        self.pending: Report | None = None
        self.versions: dict[int, ModelVersion] = {}


class _Talk:
    """One connection's calls. For one thread. Every answer is waited for ANSWER_SECONDS at most."""

    def __init__(self, party: Party, connection: ServerConnection) -> None:
        self._party = party
        self._connection = connection
        self.where = f"{connection.peer.role} {connection.peer.name}"
        identity = party.identity()
        self._own = OwnLease(identity.certificate_der)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._show()
        self._call = connection.call("Tree", iter(self._outbox.get, None), timeout=None)
        self._frames = iter(self._call)

    def look(self) -> tuple[Offer, ...]:
        """The jobs that run."""
        self._show()
        self._connection.lease.check()
        self._outbox.put(pack(Look()))
        answer = self._answer()
        if not isinstance(answer, Offered):
            raise MalformedMessage("the parent answered something else than was asked", where=self.where)
        return answer.jobs

    def exchange(
        self, job: str, report: Report, known: Mapping[int, ModelVersion], task: str
    ) -> tuple[Reply, dict[int, ModelVersion]]:
        """Report; the reply, and the versions that it names, of which those that are not known are fetched."""
        body = encode_report(report)
        demand = report.demand
        head = Reported(job=job, origin=report.origin, returned=demand.returned, waiting=demand.waiting, size=len(body))
        self._outbox.put(pack(head))
        for chunk in serve_chunks(body):
            self._outbox.put(chunk)
        answer = self._answer()
        if not isinstance(answer, Replied) or answer.job != job:
            raise MalformedMessage("the parent answered something else than was asked", where=self.where)
        duplicates = decode_duplicates(received(self._frames, answer.size, where=self.where), where=self.where)
        versions = {}
        for alive in answer.alive:
            have = known.get(alive.version)
            if have is None or have.digest != alive.sha256:
                raw = self.fetch(Fetch(job=job, what="model", sha256=alive.sha256, offset=0), alive.size)
                have = ModelVersion(alive.version, alive.sha256, raw, task)
            versions[alive.version] = have
        reply = Reply(duplicates, answer.granted, tuple(alive.version for alive in answer.alive), answer.over)
        return reply, versions

    def fetch(self, what: Fetch, size: int) -> bytes:
        """Fetch a whole. Raises MalformedMessage if it has not the digest."""
        call = self._connection.ask("TreeFetch", what, timeout=FETCH_SECONDS)
        try:
            raw = received(call, size, where=self.where)
        finally:
            call.cancel()
        if what.what == "model" and hashlib.sha256(raw).hexdigest() != what.sha256:
            raise MalformedMessage("a model has another digest than was said", where=self.where)
        return raw

    def _answer(self) -> Offered | Replied:
        guard = threading.Timer(ANSWER_SECONDS, self._call.cancel)
        guard.daemon = True
        guard.start()
        try:
            for raw in self._frames:
                frame, _ = unpack(FROM_PARENT, raw, where=self.where)
                if not isinstance(frame, (Offered, Replied)):
                    self._connection.lease.renew(frame)
                    continue
                return frame
        finally:
            guard.cancel()
        raise PeerLost("the parent ended the connection", where=self.where)

    def _show(self) -> None:
        if (lease := self._own.to_show(self._party.identity())) is not None:
            self._outbox.put(pack(lease))

    def close(self) -> None:
        """End the call."""
        self._outbox.put(None)
        self._call.cancel()


def _role(role: str) -> Role:
    return role  # type: ignore[return-value]
