"""The role `inner`: a parent to its children and a child to its parent, over the same port and credentials as a server.

It keeps nothing: what it has summed and not handed up is lost when it is killed, and the root tells so.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from fl.edge.branch import TreeBranch
from fl.edge.child import Node, NodeJob, TreeLink
from fl.edge.contract import EdgeJob, ModelVersion
from fl.edge.exchange import InnerNode, Reply, Report
from fl.edge.parent import TreeCalls, TreeJob
from fl.edge.task import DeviceTask
from fl.edge.tree_frames import Offer
from fl.errors import LeaseLapsed
from fl.jobs.bundle import Bundle
from fl.jobs.settings import FedBuffOptions
from fl.party import Party
from fl.server.calls import Caller, refusal_of, untaken
from fl.server.certificates import ServerCertificates
from fl.server.grpc_server import GrpcServer
from fl.server.https_server import HttpsServer
from fl.server.job import memory_folder
from fl.tensors import Schema
from fl.transport.frames import Lease, pack
from fl.transport.port import Port
from fl.transport.route import Route
from policies.errors import SealwrightError

CLAIM_SECONDS: Final = 20.0
"""How long a child's claims wait for the parent's answer."""


class InnerJob:
    """One job at an inner node: a parent's to children (`TreeJob`), a child's to its parent (`NodeJob`)."""

    def __init__(self, offer: Offer, bundle: Bundle) -> None:
        options = bundle.settings.options
        if not isinstance(options, FedBuffOptions):
            raise TypeError("only an edge job has a tree")
        self.offer = offer
        self.bundle = bundle.raw
        job = EdgeJob(offer.job, bundle.settings.name, "edge")
        branch = TreeBranch(job, bundle.settings.schema_of_model, os.urandom(16).hex(), lambda: 0.0)
        self.schema: Schema = branch.schema
        generator = np.random.default_rng(int.from_bytes(os.urandom(8), "big"))
        self._node = InnerNode(branch, options.edge.devices.device_sampling_strategy, generator)
        self._changed = threading.Condition()
        self._versions: Mapping[int, ModelVersion] = {}
        self._built = self._answered = 0  # reports to the parent
        self._duplicates: dict[int, Mapping[str, frozenset[bytes]]] = {}

    # for children, from many threads

    def exchange(self, child: str, report: Report) -> tuple[Reply, Mapping[int, ModelVersion]]:
        """Take a child's report; if it claims something, the reply waits for the parent's answer."""
        with self._changed:
            self._node.take(report)
            due = self._built + 1
            if report.claims and not self._changed.wait_for(lambda: self._answered >= due, CLAIM_SECONDS):
                raise LeaseLapsed("the parent has not answered claims in time", where="tree")
            return self._node.reply_to(report, self._duplicates.get(due, {})), self._versions

    def model(self, sha256: str) -> bytes | None:
        """The model with this digest, of a version that is alive."""
        with self._changed:
            return next((one.model for one in self._versions.values() if one.digest == sha256), None)

    def drop(self, origin: str) -> None:
        """A child's connection has ended."""
        with self._changed:
            self._node.drop(origin)

    # for the link's thread

    def report(self) -> Report:
        """What to say to the parent next."""
        with self._changed:
            self._built += 1
            return self._node.report()

    def hear(self, reply: Reply, versions: Mapping[int, ModelVersion]) -> None:
        """The parent's reply, which children wait for."""
        with self._changed:
            self._versions = dict(versions)
            self._node.hear(reply, versions)
            self._answered = self._built
            self._duplicates[self._answered] = reply.duplicates
            self._duplicates.pop(self._answered - 64, None)  # whoever waits looks at once
            self._changed.notify_all()


class _InnerNodes:
    """The jobs of an inner node (`Node`)."""

    def __init__(self) -> None:
        self._jobs: dict[str, InnerJob] = {}
        self._known = False

    def connected(self) -> None:
        """The parent has said which jobs run, and they run here."""
        self._known = True

    def begin(self, offer: Offer, bundle: Bundle, task: DeviceTask) -> NodeJob:
        """A job that was checked begins here."""
        job = self._jobs[offer.job] = InnerJob(offer, bundle)
        return job

    def end(self, job: str) -> None:
        """A job is over."""
        self._jobs.pop(job, None)

    def all(self) -> Mapping[str, TreeJob]:
        """Those that run, by id.

        Raises LeaseLapsed (come back) until the parent has said which: children would end theirs.
        """
        if not self._known:
            raise LeaseLapsed("this node has not heard from its parent since it started", where="tree")
        return dict(self._jobs)


class InnerService:
    """What an inner node serves (`fl.server.calls.Service`)."""

    def __init__(self, party: Party, calls: TreeCalls) -> None:
        self._party = party
        self._streamed, self._asked = calls.streamed, calls.asked

    @property
    def streamed(self) -> tuple[str, ...]:
        """The calls that take a stream of frames."""
        return tuple(self._streamed)

    @property
    def asked(self) -> tuple[str, ...]:
        """The calls that take one frame."""
        return tuple(self._asked)

    def appraise(self) -> bytes:
        """This node's current EARs. Raises Refusal while there are none."""
        try:
            return pack(Lease(ears=self._party.identity().ears))
        except SealwrightError as error:
            raise refusal_of(error) from error

    def answer(self, name: str, request: Iterator[bytes] | bytes, caller: Caller) -> Iterator[bytes]:
        """Answer the call `name`. Raises Refusal, which the log has then, too."""
        method = self._streamed.get(name) or self._asked[name]
        try:
            yield from untaken(method(request, caller), caller)
        except SealwrightError as error:
            self._party.tell(f"refused {caller.who}: {error.what}")
            raise refusal_of(error) from error


def serve_inner(
    party: Party,
    *,
    listen: str,
    parent: Route,
    parent_name: str,
    stop: threading.Event,
    patience: float = 300.0,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Be an inner node until `stop`: listen on `listen` (host:port), and stay connected to the parent.

    `ready` is called once with the address that is listened on. Raises PeerLost if the address cannot be had; what
    `TreeLink.run` raises.
    """
    jobs: _InnerNodes = _InnerNodes()
    node: Node = jobs
    service = InnerService(party, TreeCalls(party, "inner", jobs.all))
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sealwright-", dir=memory_folder())))
        sockets, certificates = (
            {driver: str(folder / driver) for driver in ("grpc", "https")},
            ServerCertificates(party),
        )
        grpc = GrpcServer(service, certificates, sockets["grpc"])
        ends.callback(grpc.close)
        https = HttpsServer(service, certificates, sockets["https"], tunnels={})
        ends.callback(https.close)
        port = Port(listen, {"grpc": sockets["grpc"], "https": https.take}, tell=party.tell)
        ends.callback(port.close)
        party.tell(f"inner node {party.identity().name} listens on {port.address}")
        ready(port.address)
        TreeLink(party, node, parent=parent, parent_name=parent_name).run(
            stop, patience=patience, connected=jobs.connected
        )
