"""The parent's end of the tree: calls that children make, over jobs that are a root's or an inner node's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from attestation.identity import dns_name
from fl.edge.contract import ModelVersion
from fl.edge.exchange import Reply, Report
from fl.edge.permits import Demand
from fl.edge.tree_frames import FROM_CHILD, Alive, Look, Offer, Offered, Replied, Reported, received
from fl.edge.wire import decode_report, encode_duplicates, max_report
from fl.errors import LeaseLapsed, MalformedMessage, RoundOver
from fl.party import Party
from fl.server.calls import Call, Caller, CallerGone, StoppedSending, first_frame, only_frame, unstalled
from fl.tensors import Schema
from fl.transport.channel import dns_names
from fl.transport.chunks import serve_chunks
from fl.transport.frames import Fetch, Lease, pack, unpack
from fl.transport.lease import OwnLease, PeerLease
from policies.questions import Place

CHILD_ROLES: Final = ("gateway", "inner")


class TreeJob(Protocol):
    """A job at a parent. Its methods are called from many threads."""

    @property
    def offer(self) -> Offer:
        """What children are told of it."""

    @property
    def bundle(self) -> bytes:
        """Its bundle."""

    @property
    def schema(self) -> Schema:
        """The tensors of floats of its model."""

    def model(self, sha256: str) -> bytes | None:
        """The model with this digest, of a version that is alive."""

    def exchange(self, child: str, report: Report) -> tuple[Reply, Mapping[int, ModelVersion]]:
        """Take the report of the node `child`; the reply, and the versions that it names. Waits, but not for long.

        Raises LeaseLapsed (come back) if whoever is above does not answer.
        """

    def drop(self, origin: str) -> None:
        """A child's connection has ended."""


class TreeCalls:
    """The calls `Tree` and `TreeFetch` of a server or an inner node."""

    def __init__(self, party: Party, role: str, jobs: Callable[[], Mapping[str, TreeJob]]) -> None:
        """`role`: of this node; `jobs`: those that run here, by id."""
        self._party = party
        self._role = role
        self._jobs = jobs
        self._attending: dict[bytes, PeerLease] = {}

    @property
    def streamed(self) -> dict[str, Call]:
        """Calls with a stream of frames."""
        return {"Tree": self._tree}

    @property
    def asked(self) -> dict[str, Call]:
        """Calls with one frame."""
        return {"TreeFetch": self._fetch}

    def _tree(self, requests: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        frames = unstalled(requests, caller)
        shown = first_frame(frames, Lease)
        certificate, identity = caller.certificate, self._party.identity()
        here: Place = (self._role, identity.name)  # type: ignore[assignment]
        lease = PeerLease(
            certificate,
            shown,
            role=child_role(certificate),
            here=here,
            charter=self._party.charter,
            clock=self._party.clock,
        )
        name = f"{lease.peer.role} {lease.peer.name}"
        own = OwnLease(identity.certificate_der)
        origins: dict[str, str] = {}
        self._attending[certificate] = lease
        self._party.tell(f"{name} is connected")
        try:
            if (mine := own.to_show(identity)) is not None:
                yield pack(mine)
            for raw in frames:
                if (mine := own.to_show(self._party.identity())) is not None:
                    yield pack(mine)
                frame, _ = unpack(FROM_CHILD, raw, where=name)
                if isinstance(frame, Lease):
                    lease.renew(frame)
                    continue
                lease.check()
                if isinstance(frame, Look):
                    yield pack(Offered(jobs=tuple(job.offer for _, job in sorted(self._jobs().items()))[:64]))
                    continue
                origins[frame.job] = frame.origin
                yield from self._exchange(lease.peer.name, frame, frames)
        except (CallerGone, StoppedSending):
            return  # it will come back, or others have its permits
        finally:
            if self._attending.get(certificate) is lease:
                del self._attending[certificate]
            for job_id, origin in origins.items():
                if (job := self._jobs().get(job_id)) is not None:
                    job.drop(origin)
            self._party.tell(f"{name} is gone")

    def _exchange(self, child: str, frame: Reported, frames: Iterator[bytes]) -> Iterator[bytes]:
        job = self._jobs().get(frame.job)
        if job is None:
            raise RoundOver(f"there is no job {frame.job}")
        if frame.size > max_report(job.schema):
            raise MalformedMessage(f"a report has {frame.size} bytes", where=child)
        body = received(frames, frame.size, where=child)
        report = decode_report(body, frame.origin, Demand(frame.returned, frame.waiting), job.schema, where=child)
        reply, versions = job.exchange(child, report)
        raw = encode_duplicates(reply.duplicates)
        alive = tuple(
            Alive(version=number, sha256=versions[number].digest, size=len(versions[number].model))
            for number in reply.alive
        )
        yield pack(Replied(job=frame.job, granted=reply.granted, alive=alive, over=reply.over, size=len(raw)))
        yield from serve_chunks(raw)

    def _fetch(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        head = only_frame(request, Fetch)
        lease = self._attending.get(caller.certificate)
        if lease is None:
            raise LeaseLapsed("the caller is not connected", where="connection")
        lease.check()
        job = self._jobs().get(head.job)
        if job is None:
            raise RoundOver(f"there is no job {head.job}")
        if head.what == "bundle" and head.sha256 == job.offer.bundle:
            return serve_chunks(job.bundle, head.offset)
        model = job.model(head.sha256)
        if model is None:
            raise RoundOver(f"job {head.job} has other versions now")
        return serve_chunks(model, head.offset)


def child_role(certificate: bytes) -> str:
    """The role that a caller's certificate names, which is appraised right after; one that no child has, otherwise."""
    names = dns_names(certificate)
    return next((role for role in CHILD_ROLES for name in names if name.endswith(_suffix(role))), CHILD_ROLES[0])


def _suffix(role: str) -> str:
    return dns_name(role, "x")[1:]
