"""Leases of a few seconds given by three real brokers, two of which have to vouch: cuts, pauses, a withdrawn image."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from federation_world import MODEL_KEY, SERVER, TRAIN, UserKeys, make_job, make_user, wait_until
from raw_site import RawSite, status_of
from safetensors.numpy import load_file

from appliance.node import Lease as NodeLease
from attestation.evidence.report import Product
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from benchmarks.trials import load_trial
from fl.environments.kit import Kit, KitFile
from fl.environments.user_client import UserClient
from fl.errors import CallFailed
from fl.guard.limits import Limits
from fl.jobs.progress import JobEvent
from fl.server import serve
from fl.site import run as run_site
from fl.transport.channel import connect
from fl.transport.frames import Lease, Train, pack
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.documents import Allowance, BundleApproval
from policies.errors import Refused
from policies.init_data import BrokerAddress, ServerAddress

NAMES = ("one", "two", "three")
SITES = ("north", "south")
ADA = "acme-pharma/ada"
SLOW = TRAIN.replace("while flare.is_running():", "import time\nwhile flare.is_running():\n    time.sleep(1.0)", 1)


@dataclass
class Trial:
    """The consortium, its running brokers and a user."""

    world: Any
    brokers: list[Any]
    ada: UserKeys
    told: list[str] = field(default_factory=list)

    def freeze(self, frozen: bool) -> None:
        """Cut all brokers off, or bring them back."""
        for broker in self.brokers:
            broker.process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def set_lease(self, seconds: int) -> None:
        consortium = self.world.charter().consortium.model_copy(update={"lease_seconds": seconds})
        self.world.change(Changes(consortium=consortium))

    def client(self, address: str) -> Any:
        keys, charter = self.ada, self.world.charter()
        kit = Kit(
            KitFile(
                member=keys.member,
                user=keys.name,
                charter=charter.id,
                brokers=(BrokerAddress(name="one", url="https://127.0.0.1:1"),),
                server=ServerAddress(name=SERVER, address=address),
            ),
            self.world.root,
            keys.tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            keys.certificate,
            keys.signing,
            keys.results,
            MODEL_KEY,
        )
        from federation_world import now

        return UserClient.connected(kit, charter, now())


class Running:
    """A guest in threads: its lease is kept by the code of the guest's image, its service runs beside."""

    def __init__(self, trial: Trial, role: str, name: str) -> None:
        self.stop = threading.Event()
        self.refusals: list[Refused] = []
        self.ready = threading.Event()
        self.address = ""
        self.error: Refused | None = None
        self._told = trial.told
        self.session = trial.world.guest(role, name, timeout=1.5)
        self.lease = NodeLease(self.session, self.stop)
        self._threads = [threading.Thread(target=self.lease.keep, args=(self._refused,), name=f"lease {name}")]

    def _refused(self, error: Refused) -> None:
        self.refusals.append(error)
        self.stop.set()

    def serve(self) -> Running:
        def target() -> None:
            serve(**self._common(), listen="127.0.0.1:0", model_key=MODEL_KEY, ready=self._listening)

        return self._start(target)

    def train(self, address: str, number: float) -> Running:
        def target() -> None:
            try:
                run_site(
                    **self._common(),
                    server=address,
                    server_name=SERVER,
                    data={"number.txt": str(number).encode()},
                    limits=Limits(),
                    connected=self.ready.set,
                )
            except Refused as error:
                self.error = error

        return self._start(target)

    def _common(self) -> dict[str, Any]:
        lease = self.lease
        common = {"identity": lease.identity, "charter": lease.charter, "clock": lease.now, "record": lease.record}
        return {**common, "stop": self.stop, "tell": self._told.append}

    def _listening(self, address: str) -> None:
        self.address = address
        self.ready.set()

    def _start(self, target: Callable[[], None]) -> Running:
        self._threads.append(threading.Thread(target=target))
        for thread in self._threads:
            thread.start()
        assert self.ready.wait(30)
        return self

    def end(self) -> None:
        self.stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(30)
        self.session.close()


@pytest.fixture(scope="module")
def trial(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip]
) -> Iterator[Trial]:
    tools = load_trial("attestation/broker/conftest.py", "broker_trial")
    ada = make_user("acme-pharma", "ada", "submit", "view", "download")
    folder = tmp_path_factory.mktemp("leases")
    world = tools.found_world(
        folder,
        virtual_vendor,
        virtual_chips,
        NAMES,
        broker_threshold=2,
        lease_seconds=5,
        more=files_of([ada.document()]),
    )
    brokers: list[Any] = []
    found = Trial(world, brokers, ada)
    try:
        brokers += [tools.start_broker(world.folder / entry.name, entry) for entry in world.entries]
        yield found
    finally:
        found.freeze(False)
        for broker in brokers:
            if broker.process.poll() is None:
                broker.stop()


@contextmanager
def federation(trial: Trial) -> Iterator[tuple[Running, dict[str, Running]]]:
    """The server and both sites."""
    with ExitStack() as stack:

        def start(role: str, name: str) -> Running:
            running = Running(trial, role, name)
            stack.callback(running.end)
            return running

        server = start("server", SERVER).serve()
        sites = {name: start("site", name).train(server.address, 1.0 + 2 * index) for index, name in enumerate(SITES)}
        yield server, sites


def run_job(
    trial: Trial, guests: list[Running], folder: Path, name: str, rounds: int, act: Callable[[JobEvent], None]
) -> Any:
    """Run a job of one-second rounds; the model's values and the events."""
    bundle, model = make_job(folder, f"# {name}\n{SLOW}", name=name, num_rounds=rounds, round_seconds=60)
    expires = trial.world.charter().expires + timedelta(days=1)
    approval = BundleApproval(
        bundle=bundle.digest,
        job=name,
        sites=SITES,
        expires=expires.replace(microsecond=0),
        budget=Allowance(bits=1 << 50),
    )
    trial.world.change(Changes(put=files_of([approval])))
    version = trial.world.charter().version
    assert wait_until(lambda: all(guest.lease.charter().version >= version for guest in guests), 30)
    server = guests[0]
    events: list[JobEvent] = []
    with model, trial.client(server.address) as client:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        for event in client.watch(job, timeout=120):
            events.append(event)
            act(event)
    assert events[-1].text == "finished", (events, trial.told)
    with trial.client(server.address) as client:
        result = client.download(job, folder / "result", ledgers=None)
    told = json.loads((result / "job.json").read_text())
    assert [sorted(one["updates"]) for one in told["rounds"]] == [list(SITES)] * rounds
    return load_file(result / "model.safetensors")["w"].tolist(), events


@pytest.mark.long
def test_a_cut_shorter_than_the_lease_disturbs_nothing(trial: Trial, tmp_path: Path) -> None:
    trial.set_lease(20)
    try:
        with federation(trial) as (server, sites):

            def act(event: JobEvent) -> None:
                if event.kind == "round" and event.round == 1:
                    trial.freeze(True)
                    threading.Timer(4.0, lambda: trial.freeze(False)).start()

            model, events = run_job(trial, [server, *sites.values()], tmp_path, "short-cut", 8, act)
    finally:
        trial.freeze(False)
        trial.set_lease(5)
    assert model == [16.0] * 3
    assert not [event for event in events if event.kind in {"paused", "lost", "refused"}]


@pytest.mark.long
def test_a_longer_cut_pauses_the_job_until_the_brokers_are_back(trial: Trial, tmp_path: Path) -> None:
    mended = threading.Event()

    def mend() -> None:
        mended.set()
        trial.freeze(False)

    def act(event: JobEvent) -> None:
        if event.kind == "round" and event.round == 1:
            trial.freeze(True)
        if event.kind == "paused" and not mended.is_set():
            threading.Timer(3.0, mend).start()

    with federation(trial) as (server, sites):
        try:
            model, events = run_job(trial, [server, *sites.values()], tmp_path, "long-cut", 4, act)
        finally:
            trial.freeze(False)
        assert [site.error for site in sites.values()] == [None, None]
    assert model == [8.0] * 3
    assert {event.site for event in events if event.kind == "paused"} == set(SITES)
    assert {event.site for event in events if event.kind == "resumed"} == set(SITES)
    assert not [event for event in events if event.kind in {"lost", "refused"}]


def test_a_withdrawn_image_ends_its_sites_within_one_lease(trial: Trial) -> None:
    """Two sites of the image: one obeys, the other renews nothing and keeps its connection for what it is worth.

    The server names the image, not the time: it cut both while the leases that they had still stood.
    """
    with ExitStack() as stack:
        server, honest = Running(trial, "server", SERVER), Running(trial, "site", "north")
        stack.callback(server.end)
        stack.callback(honest.end)
        server.serve()
        honest.train(server.address, 1.0)
        hostile = trial.world.guest("site", "south")
        stack.callback(hostile.close)
        identity = hostile.attest()
        connection = stack.enter_context(
            connect(
                server.address,
                server=SERVER,
                tls_key=identity.tls_key_pem,
                certificate_pem=identity.certificate_pem,
                charter=lambda: hostile.charter,
                clock=hostile.now,
            )
        )
        site = RawSite(connection)
        site.attend(pack(Lease(ears=hostile.renew().ears)))
        site.hear(Lease)
        trial.world.change(Changes(remove=frozenset({"images/site-image.json"})))
        with pytest.raises(CallFailed) as caught:
            site.hear(Train)
        status, details = status_of(caught.value)
        assert status == "PERMISSION_DENIED", details
        assert "the measurement of site/south is no approved image's" in details
        assert wait_until(lambda: honest.stop.is_set() or honest.error is not None, 15)
        with pytest.raises(Refused) as refused:
            hostile.renew()
    reasons = "\n".join(refused.value.reasons)
    for name in NAMES:
        assert f"{name}: " in reasons
    ended = honest.refusals[0] if honest.refusals else honest.error
    why = "" if ended is None else "\n".join(ended.reasons)
    assert "measurement" in why, why
