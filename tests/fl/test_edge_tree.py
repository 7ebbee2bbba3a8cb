"""The tree over the one port: root, inner node and gateways with attested credentials; who has none gets nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from federation_world import SERVER, FederationWorld, found_federation, now, wait_until

from attestation.errors import PeerRefused
from fl.edge.branch import bounds_of
from fl.edge.child import TreeLink
from fl.edge.contract import Update, contribution_id
from fl.edge.gateway_tree import GatewayTree
from fl.edge.inner import InnerService, serve_inner
from fl.edge.parent import TreeCalls
from fl.edge.root import RootJob
from fl.edge.settings import DeviceManagerConfig, EdgeSettings, ModelManagerConfig
from fl.edge.task import DeviceTask
from fl.edge.tree_frames import Offer
from fl.jobs.bundle import Bundle, make_bundle
from fl.jobs.progress import JobEvent
from fl.jobs.record import JobRecord, sign_record
from fl.jobs.settings import JobSettings
from fl.party import Party
from fl.server.certificates import ServerCertificates
from fl.server.grpc_server import GrpcServer
from fl.tensors import encode, parse
from fl.transport.memory import SealedMemory
from fl.transport.port import Port
from fl.transport.route import Driver, Route
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.documents import Enrolment, ImageReference, ReferenceMeasurement, Role
from policies.errors import Refused

NODES: tuple[tuple[Role, str], ...] = (("inner", "north"), ("gateway", "gate-1"), ("gateway", "gate-2"))
MEASUREMENTS = {"inner": "33" * 48, "gateway": "44" * 48}
NAMES = tuple(name for _, name in NODES)
EDGE = EdgeSettings(
    models=ModelManagerConfig(
        num_updates_for_model=4, max_model_version=3, global_lr=1.0, max_num_active_model_versions=1
    ),
    devices=DeviceManagerConfig(device_selection_size=8),
)


def found_tree(folder: Path) -> FederationWorld:
    """The consortium of `federation_world` with a place for each node."""
    made = found_federation(folder)
    images = [
        ImageReference(
            name=f"{role}-image",
            platform="virtual",
            manifest_sha256="0" * 64,
            svn=1,
            measurements=(
                ReferenceMeasurement(
                    measurement=MEASUREMENTS[role], vcpu_model="EPYC-v4", vcpus=2, vmm="qemu", guest_features=1
                ),
            ),
            roles=(role,),
        )
        for role in ("inner", "gateway")
    ]
    places = [
        Enrolment(
            role=role,
            name=name,
            member="acme-pharma",
            image=f"{role}-image",
            init_data_sha256=sha256(f"{role}/{name}".encode()).hexdigest(),
        )
        for role, name in NODES
    ]
    made.change(Changes(put=files_of([*images, *places])))
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_tree(tmp_path_factory.mktemp("world"))


def bundle_of(edge: EdgeSettings = EDGE) -> Bundle:
    settings = JobSettings.model_validate(
        {
            "name": "toy",
            "recipe": "fedbuff",
            "options": {"recipe": "fedbuff", "edge": edge.model_dump(), "config": {"lr": 0.5}},
            "num_rounds": edge.models.max_model_version - 1,
            "min_clients": 1,
            "train_script": "training.pte",
            "framework": "pytorch",
            "params_type": "DIFF",
            "model": {"w": {"dtype": "F32", "shape": (3,)}},
        }
    )
    empty = Path("/nonexistent-folder")
    return make_bundle(empty, settings, {"training.pte": b"a graph"})


@dataclass
class Tree:
    """A root over TLS, and what grows below it."""

    world: FederationWorld
    ends: ExitStack
    bundle: Bundle
    root: RootJob
    address: str
    events: list[JobEvent]
    errors: list[Exception] = field(default_factory=list)
    expected: tuple[type[Exception], ...] = ()

    def party(self, role: str, name: str) -> Party:
        identity = self.world.identity(role, name, seconds=600, measurement=MEASUREMENTS[role])
        return Party(lambda: identity, self.world.charter, now, self.world.record, self.world.told.append)

    def _run(self, work: Callable[[threading.Event], None]) -> threading.Event:
        stop = threading.Event()

        def run() -> None:
            try:
                work(stop)
            except Exception as error:
                self.errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()

        def end() -> None:
            stop.set()
            thread.join(15)
            assert not thread.is_alive()

        self.ends.callback(end)
        return stop

    def inner(self, name: str = "north") -> tuple[str, threading.Event]:
        ready: SimpleQueue[str] = SimpleQueue()
        stop = self._run(
            lambda stop: serve_inner(
                self.party("inner", name),
                listen="127.0.0.1:0",
                parent=Route((self.address,)),
                parent_name=SERVER,
                stop=stop,
                patience=5.0,
                ready=ready.put,
            )
        )
        return ready.get(timeout=10), stop

    def gateway(
        self, name: str, parent: str, parent_name: str, *, party: Party | None = None, driver: Driver = "grpc"
    ) -> tuple[GatewayTree, threading.Event]:
        tree, way = GatewayTree(), Route((parent,), driver)
        own = party or self.party("gateway", name)
        link = TreeLink(own, tree, parent=way, parent_name=parent_name, moment=0.05)
        return tree, self._run(lambda stop: link.run(stop, patience=5.0))

    def told(self, kind: str) -> list[JobEvent]:
        return [event for event in self.events if event.kind == kind]


@contextmanager
def grown(world: FederationWorld, bundle: Bundle) -> Iterator[Tree]:
    world.told.clear()
    if world.charter().bundle(bundle.digest) is None:
        world.approve(bundle, NAMES)
    user = world.users["acme-pharma/ada"]
    first = SealedMemory.of(encode({"w": (bundle.settings.schema_of_model["w"], bytes(12))}))
    record = JobRecord(
        charter=world.charter().id,
        job="job-1",
        name="toy",
        bundle=bundle.digest,
        server=SERVER,
        roster=NAMES,
        recipients=("acme-pharma/ada",),
        rounds=bundle.settings.num_rounds,
        min_sites=1,
        model_sha256=first.digest,
        model_size=first.size,
        created=f"{now():%Y-%m-%dT%H:%M:%SZ}",
        submitter="acme-pharma/ada",
    )
    options: Any = bundle.settings.options
    offer = Offer(
        job="job-1", record=sign_record(record, user.signing), bundle=bundle.digest, bundle_size=len(bundle.raw)
    )
    task = DeviceTask("toy", "executorch", bundle.files["training.pte"], options.config)
    events: list[JobEvent] = []
    root = RootJob(offer, bundle.raw, bundle.settings.schema_of_model, first, options.edge, task.digest, events.append)
    identity = world.identity("server", SERVER, seconds=600)
    party = Party(lambda: identity, world.charter, now, world.record, world.told.append)
    with ExitStack() as ends:
        folder = ends.enter_context(_folder())
        service = InnerService(party, TreeCalls(party, "server", lambda: {"job-1": root}))
        grpc = GrpcServer(service, ServerCertificates(party), f"{folder}/grpc")
        ends.callback(grpc.close)
        port = Port("127.0.0.1:0", {"grpc": f"{folder}/grpc"}, tell=world.told.append)
        ends.callback(port.close)
        tree = Tree(world, ends, bundle, root, port.address, events)
        tree._run(lambda stop: versions_made(root, stop))
        yield tree
    assert all(isinstance(error, tree.expected) for error in tree.errors)


def versions_made(root: RootJob, stop: threading.Event) -> None:
    """What the algorithm's thread does."""
    while not stop.is_set():
        if root.wait(0.2):
            stop.wait()


@contextmanager
def _folder() -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        yield folder


def update(device: int, version: int) -> Update:
    delta = np.full(3, float(device), np.float32)
    return Update(version, {"w": delta}, 1.0, contribution_id("job-1", version, str(device)))


def weights(root: RootJob) -> float:
    with root.result() as model:
        return float(parse(model.view, max_size=model.size).array("w")[0])


def has_version(tree: GatewayTree, number: int) -> bool:
    branch = tree.branches().get("job-1")
    return branch is not None and [one.version for one in branch.current()] == [number]


def test_updates_climb_through_inner_nodes_and_versions_come_down(world: FederationWorld) -> None:
    with grown(world, bundle_of()) as tree:
        address, _ = tree.inner()
        one, _ = tree.gateway("gate-1", address, "north")
        two, _ = tree.gateway("gate-2", tree.address, SERVER)  # a gateway may be at any tier
        for gateway in (one, two):
            assert wait_until(lambda gateway=gateway: has_version(gateway, 1)), (tree.errors, world.told)
        first, second = (gateway.branches()["job-1"] for gateway in (one, two))
        assert first.job.name == "toy"
        version = first.current()[-1]
        assert version.digest == sha256(version.model).hexdigest()
        task = first.task(version.task)
        assert task is not None
        assert (task.graph, task.config) == (b"a graph", {"lr": 0.5})
        assert wait_until(lambda: first.select("device-1") is not None)  # the first time it is told to wait
        for device in (1, 2, 3):
            assert first.add(update(device, 1)) == "counted"
        assert second.add(update(3, 1)) == "counted"  # the same device at another gateway: once in the tree
        assert second.add(update(6, 1)) == "counted"
        assert wait_until(lambda: tree.root.made == 1), world.told
        assert weights(tree.root) == pytest.approx((1 + 2 + 3 + 6) / 4)
        assert wait_until(lambda: has_version(one, 2) and has_version(two, 2))
        assert first.add(update(1, 1)) == "stale"
        for device in (1, 2, 3, 4):
            second.add(update(device, 2))
        assert wait_until(lambda: first.over and second.over)
        assert tree.root.wait(0)
        assert not tree.told("refused")
        assert {event.site for event in tree.told("update")} == {"north", "gate-2"}


def test_an_inner_node_has_both_drivers_on_its_port(world: FederationWorld) -> None:
    """One child comes by HTTPS, one by gRPC; who has no attested credential gets nothing by either."""
    with grown(world, bundle_of()) as tree:
        address, _ = tree.inner()
        one, _ = tree.gateway("gate-1", address, "north", driver="https")
        two, _ = tree.gateway("gate-2", address, "north")
        for gateway in (one, two):
            assert wait_until(lambda gateway=gateway: has_version(gateway, 1)), (tree.errors, world.told)
        for gateway, devices in ((one, (1, 2)), (two, (3, 6))):
            for device in devices:
                assert gateway.branches()["job-1"].add(update(device, 1)) == "counted"
        assert wait_until(lambda: tree.root.made == 1), world.told
        assert weights(tree.root) == pytest.approx((1 + 2 + 3 + 6) / 4)
        assert wait_until(lambda: has_version(one, 2) and has_version(two, 2))
        false = world.identity("gateway", "gate-2", seconds=600, measurement="66" * 48)
        party = Party(lambda: false, world.charter, now, world.record, world.told.append)
        stranger, stop = tree.gateway("gate-2", address, "north", party=party, driver="https")
        assert wait_until(lambda: any("refused" in line and "measure" in line for line in world.told)), world.told
        assert not stranger.branches()
        stop.set()
        tree.expected = (Refused,)


def test_a_gateway_that_is_killed_loses_what_it_had_not_sent_and_the_root_says_so(world: FederationWorld) -> None:
    with grown(world, bundle_of()) as tree:
        doomed, stop = tree.gateway("gate-1", tree.address, SERVER)
        assert wait_until(lambda: has_version(doomed, 1)), (tree.errors, world.told)
        branch: Any = doomed.branches()["job-1"]
        claimed = branch.report  # the link claims; the gateway dies with what it folded then

        def once_claimed() -> Any:
            found = claimed()
            if found.claims:
                stop.set()
            return found

        branch.report = once_claimed
        branch.add(update(50, 1))
        assert wait_until(lambda: bool(tree.told("paused"))), world.told
        assert "1 updates that it counted have not come" in tree.told("paused")[0].text
        other, _ = tree.gateway("gate-2", tree.address, SERVER)
        assert wait_until(lambda: has_version(other, 1))
        for device in (1, 2, 3, 4):
            other.branches()["job-1"].add(update(device, 1))
        assert wait_until(lambda: tree.root.made == 1), world.told
        assert weights(tree.root) == pytest.approx(2.5)
        (lost,) = tree.told("lost")
        assert lost.site == "gate-1"
        assert "1 updates that it had counted never came" in lost.text


def test_an_inner_node_that_starts_anew_is_found_again_and_nothing_counts_twice(world: FederationWorld) -> None:
    with grown(world, bundle_of()) as tree:
        address, stop = tree.inner()
        gateway, _ = tree.gateway("gate-1", address, "north")
        assert wait_until(lambda: has_version(gateway, 1)), (tree.errors, world.told)
        branch = gateway.branches()["job-1"]
        for device in (1, 2):
            branch.add(update(device, 1))
        assert wait_until(lambda: tree.root._buff.buffered == 2), world.told
        stop.set()
        for device in (3, 4):
            branch.add(update(device, 1))
        assert wait_until(lambda: any("inner north is gone" in line for line in world.told))
        tree._run(
            lambda stop: serve_inner(
                tree.party("inner", "north"),
                listen=address,
                parent=Route((tree.address,)),
                parent_name=SERVER,
                stop=stop,
                patience=5.0,
            )
        )
        assert wait_until(lambda: tree.root.made == 1, 15), world.told
        assert weights(tree.root) == pytest.approx(2.5)
        assert gateway.branches()["job-1"] is branch  # a node that knows of no jobs yet ends none of its children's


def test_an_inner_node_without_a_parent_has_its_children_wait(world: FederationWorld) -> None:
    with grown(world, bundle_of()) as tree:
        lost = Tree(world, tree.ends, tree.bundle, tree.root, "127.0.0.1:1", [])
        address, stop = lost.inner()
        gateway, _ = tree.gateway("gate-1", address, "north")
        assert wait_until(lambda: any("has not heard from its parent" in line for line in world.told)), world.told
        assert not gateway.branches()
        assert not tree.errors  # it goes on trying
        stop.set()


def test_who_is_not_attested_as_a_node_gets_nothing(world: FederationWorld) -> None:
    with grown(world, bundle_of()) as tree:
        false = world.identity("gateway", "gate-1", seconds=600, measurement="66" * 48)
        party = Party(lambda: false, world.charter, now, world.record, world.told.append)
        gateway, stop = tree.gateway("gate-1", tree.address, SERVER, party=party)
        assert wait_until(lambda: any("refused" in line and "measure" in line for line in world.told)), world.told
        assert not gateway.branches()
        stop.set()
        site = world.identity("site", "cygnus-bio", seconds=600)  # attested, but of another role
        party = Party(lambda: site, world.charter, now, world.record, world.told.append)
        gateway, stop = tree.gateway("gate-1", tree.address, SERVER, party=party)
        assert wait_until(lambda: sum("refused" in line for line in world.told) > 1), world.told
        assert not gateway.branches()
        stop.set()
        tree.expected = (Refused,)


def test_a_parent_that_is_another_is_refused_before_anything_is_said(world: FederationWorld) -> None:
    with grown(world, bundle_of()) as tree:
        gateway, _ = tree.gateway("gate-1", tree.address, "north")  # what answers there is the server
        assert wait_until(lambda: bool(tree.errors))
        assert isinstance(tree.errors.pop(), PeerRefused)
        assert not gateway.branches()


def test_a_job_that_is_not_approved_for_a_gateway_is_not_taken(world: FederationWorld) -> None:
    bundle = bundle_of(EDGE.model_copy(update={"task_seconds": 61.0}))
    with grown(world, bundle) as tree:
        world.approve(bundle, ("gate-2", "north"))
        gateway, _ = tree.gateway("gate-1", tree.address, SERVER)
        assert wait_until(lambda: any("job job-1 is not taken" in line for line in world.told)), world.told
        assert not gateway.branches()


def test_private_jobs_bound_devices_at_their_gateways() -> None:
    assert bounds_of(EDGE).max_norm is None


def test_an_edge_job_runs_at_the_server_as_any_job_does(world: FederationWorld, tmp_path: Path) -> None:
    """Submitted by a user, run at the real server, trained through a gateway, downloaded with its statement."""
    world.told.clear()
    bundle = bundle_of()
    if world.charter().bundle(bundle.digest) is None:
        world.approve(bundle, NAMES)
    first = SealedMemory.of(encode({"w": (bundle.settings.schema_of_model["w"], bytes(12))}))
    with world.server() as address, ExitStack() as ends, world.client(address) as client:
        tree = Tree(world, ends, bundle, None, address, [])  # type: ignore[arg-type]
        gateway, _ = tree.gateway("gate-1", address, SERVER)
        with first:
            job = client.submit(bundle, first, roster=NAMES, recipients=("acme-pharma/ada",))
        assert wait_until(lambda: job in gateway.branches() and bool(gateway.branches()[job].current())), world.told
        branch = gateway.branches()[job]
        for number in (1, 2):
            assert wait_until(lambda number=number: branch.current()[-1].version == number), world.told
            for device in (1, 2, 3, 4):
                delta = np.full(3, float(device), np.float32)
                name = contribution_id(job, number, str(device))
                assert branch.add(Update(number, {"w": delta}, 1.0, name)) == "counted"
        assert wait_until(lambda: client.report(job).status.over), world.told
        report = client.report(job)
        assert report.status == "finished", report.reasons
        folder = client.download(job, tmp_path / "result", ledgers=None)
        model = parse((folder / "model.safetensors").read_bytes(), max_size=1 << 20)
        np.testing.assert_allclose(model.array("w"), 5.0)
        assert wait_until(lambda: job not in gateway.branches())
        assert any(kind == "job" and said.get("event") == "taken" for kind, said in world.ledger)
    assert not tree.errors


def test_an_edge_job_that_is_stopped_ends_at_its_gateways(world: FederationWorld) -> None:
    world.told.clear()
    bundle = bundle_of()
    first = SealedMemory.of(encode({"w": (bundle.settings.schema_of_model["w"], bytes(12))}))
    with world.server() as address, ExitStack() as ends, world.client(address) as client:
        tree = Tree(world, ends, bundle, None, address, [])  # type: ignore[arg-type]
        gateway, _ = tree.gateway("gate-1", address, SERVER)
        with first:
            job = client.submit(bundle, first, roster=NAMES, recipients=("acme-pharma/ada",))
        assert wait_until(lambda: job in gateway.branches()), world.told
        client.abort(job)
        assert wait_until(lambda: client.report(job).status == "aborted"), client.report(job)
        assert wait_until(lambda: job not in gateway.branches())
    assert not tree.errors
