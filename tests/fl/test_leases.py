"""Leases over real TLS: what ends a connection, what only pauses a job, and what is never waited out."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from federation_world import SERVER, SITES, TRAIN, FederationWorld, found_federation, make_job, now, wait_until
from raw_site import raw_site, status_of
from safetensors.numpy import load_file

from attestation.canonical import b64
from attestation.errors import LeaseEnded, PeerRefused
from attestation.identity import Identity
from fl.errors import CallFailed, LeaseLapsed
from fl.jobs.progress import JobEvent
from fl.server.federation import Task
from fl.server.job import RemoteSite
from fl.transport.frames import Away, Lease, Train, pack
from policies.charter import Changes
from policies.errors import Unusable

ADA = "acme-pharma/ada"
SLOW = TRAIN.replace("while flare.is_running():", "import time\nwhile flare.is_running():\n    time.sleep(0.7)", 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fl.server.attendance", "fl.site.link"):
        monkeypatch.setattr(f"{module}.CHECK_SECONDS", 0.2)


@pytest.fixture
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


class Guest:
    """A guest whose brokers a test cuts off: its lease is renewed as long as `cut` is not set."""

    def __init__(self, world: FederationWorld, role: str, name: str, seconds: int = 2) -> None:
        self._world = world
        self._seconds = seconds
        self._identity = world.identity(role, name, seconds=seconds)
        self.cut = threading.Event()

    def __call__(self) -> Identity:
        if not self.cut.is_set() and (self._identity.lease_ends - now()).total_seconds() < self._seconds:
            self._identity = self._world.renewed(self._identity, self._seconds)
        if now() >= self._identity.lease_ends:
            raise LeaseEnded(self._identity.spiffe_id)
        return self._identity


def watched(world: FederationWorld, address: str, job: str, act: Callable[[JobEvent], None]) -> list[JobEvent]:
    events = []
    with world.client(address) as client:
        for event in client.watch(job, timeout=90):
            events.append(event)
            act(event)
    return events


@pytest.mark.parametrize("who", ["site", "server", "both"])
def test_a_lease_that_ends_pauses_the_job_which_then_goes_on(
    world: FederationWorld, tmp_path: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brokers are out of reach for one site, for the server, or for all: nothing is lost and nothing counts twice."""
    bundle, model = make_job(tmp_path, f"# {who}\n{SLOW}", name=f"pausing-{who}", num_rounds=4)
    world.approve(bundle)
    hub, north = Guest(world, "server", SERVER), Guest(world, "site", SITES[0])
    guests = {"site": [north], "server": [hub], "both": [hub, north]}[who]
    pauses: dict[str, Any] = {"pause": 60.0, "patience": 60.0}
    cut_once, all_back = threading.Event(), threading.Event()
    pausing = {SITES[0]} if who == "site" else set(SITES)
    back: set[str | None] = set()
    honest = RemoteSite.give

    def give(site: RemoteSite, task: Task) -> None:
        if task.round == 2:  # the job is not to end before whoever pauses is back
            all_back.wait(60)
        honest(site, task)

    monkeypatch.setattr(RemoteSite, "give", give)

    def act(event: JobEvent) -> None:
        if event.kind == "resumed":
            back.add(event.site)
            if back >= pausing:
                all_back.set()
        if event.kind == "round" and event.round == 1:
            for guest in guests:
                guest.cut.set()
        if event.kind == "paused" and not cut_once.is_set():
            cut_once.set()

            def mend() -> None:
                for guest in guests:
                    guest.cut.clear()

            threading.Timer(1.5, mend).start()

    with (
        world.server(identity=hub) as address,
        world.site(address, SITES[0], number=1.0, identity=north, **pauses),
        world.site(address, SITES[1], number=3.0, **pauses),
        model,
    ):
        with world.client(address) as client:
            job = client.submit(bundle, model, roster=None, recipients=[ADA])
        events = watched(world, address, job, act)
        assert events[-1].text == "finished", events
        with world.client(address) as client:
            folder = client.download(job, tmp_path / "result", ledgers=None)
    paused = {event.site for event in events if event.kind == "paused"}
    assert paused == back == pausing
    assert not [event for event in events if event.kind in {"lost", "refused"}]
    why = next(event.text for event in events if event.kind == "paused")
    assert "not renewed" in why or "lease has ended" in why
    assert load_file(folder / "model.safetensors")["w"].tolist() == [8.0, 8.0, 8.0]
    rounds = json.loads((folder / "job.json").read_text())["rounds"]
    assert [sorted(one["updates"]) for one in rounds] == [list(SITES)] * 4


def test_a_pause_is_bounded(world: FederationWorld, server: str) -> None:
    north = Guest(world, "site", SITES[0])
    with world.site(server, SITES[0], identity=north, pause=1.0) as running:
        north.cut.set()
        assert wait_until(lambda: running.error is not None, 15)
    assert isinstance(running.error, (LeaseEnded, LeaseLapsed))


def test_a_renewed_lease_keeps_the_connection_however_often(world: FederationWorld, server: str) -> None:
    world.told.clear()
    with world.site(server, SITES[0], identity=Guest(world, "site", SITES[0])) as running:
        assert not wait_until(lambda: running.error is not None, 6)
    assert sum("is connected to the attested server" in line for line in world.told) == 1


def cut_off(world: FederationWorld, address: str, shown: Callable[[Identity], Lease]) -> tuple[str, str]:
    """How the server ends the connection of a site that shows this in band."""
    identity = world.identity("site", SITES[1], seconds=30)
    with raw_site(world, address, identity) as site:
        site.say(shown(identity))
        with pytest.raises(CallFailed) as caught:
            site.hear(Train)
        return status_of(caught.value)


def test_what_a_site_shows_in_band_has_to_hold(world: FederationWorld, server: str) -> None:
    def of_another(identity: Identity) -> Lease:
        return Lease(ears=world.identity("site", SITES[1]).ears)

    def false_certificate(identity: Identity) -> Lease:
        return Lease(ears=identity.ears, certificate=b64(world.identity("site", SITES[1]).certificate_der))

    def old(identity: Identity) -> Lease:
        return Lease(ears=world.renewed(replace(identity), -5).ears)

    for shown, status, reason in (
        (of_another, "PERMISSION_DENIED", "another TLS key"),
        (false_certificate, "PERMISSION_DENIED", "over another key than the connection's"),
        (lambda identity: Lease(ears=identity.ears, certificate="AAAA"), "PERMISSION_DENIED", "cannot be read"),
        (lambda identity: Lease(ears=identity.ears * 2), "PERMISSION_DENIED", "two EARs are broker one's"),
        (lambda identity: Lease(ears=("x.y.z",)), "PERMISSION_DENIED", "base64url"),
        (old, "FAILED_PRECONDITION", "was not renewed: the EAR ended"),
    ):
        told = cut_off(world, server, shown)
        assert told[0] == status
        assert reason in told[1]


def test_a_newer_certificate_over_the_same_key_is_taken_in_band(world: FederationWorld, server: str) -> None:
    identity = world.identity("site", SITES[1], seconds=30)
    newer = world.recertified(identity)
    with raw_site(world, server, identity) as site:
        site.say(Lease(ears=identity.ears, certificate=b64(newer.certificate_der)))
        site.say(Lease(ears=identity.ears))
        with world.client(server) as client:
            assert not wait_until(lambda: client.reports().sites != (SITES[1],), 1)


def test_the_largest_credential_that_is_issued_connects(world: FederationWorld, server: str) -> None:
    """gRPC hands a client's certificate back to it in session tickets, for which it has little room."""
    with pytest.raises(Unusable, match="no list of EARs"):
        world.identity("site", SITES[1], filler=os.urandom(5000).hex())
    large = world.identity("site", SITES[1], filler=os.urandom(3300).hex())
    assert len(large.certificate_der) > 4500
    with world.site(server, SITES[1], identity=large) as running:
        assert running.error is None


def test_a_server_that_shows_another_guests_ears_is_left_at_once(world: FederationWorld) -> None:
    own = [world.identity("server", SERVER, seconds=30)]
    with world.server(identity=lambda: own[0]) as address, world.site(address, SITES[0]) as running:
        own[0] = replace(own[0], ears=world.identity("server", SERVER).ears)
        assert wait_until(lambda: running.error is not None)
    assert isinstance(running.error, PeerRefused)
    assert "another TLS key" in str(running.error.reasons)


def test_a_withdrawn_place_ends_the_connection_with_the_sentence(world: FederationWorld) -> None:
    """The site renews nothing and obeys nobody; the server has heard of a newer charter."""
    with world.server() as address:
        identity = world.identity("site", SITES[1])
        with raw_site(world, address, identity) as site:
            image = world.charter().files["images/site-image.json"]
            world.change(Changes(remove=frozenset({"images/site-image.json"})))
            try:
                with pytest.raises(CallFailed) as caught:
                    site.hear(Train)
            finally:
                world.change(Changes(put={"images/site-image.json": image}))
    status, details = status_of(caught.value)
    assert status == "PERMISSION_DENIED"
    assert f"the measurement of site/{SITES[1]} is no approved image's" in details


def test_a_site_says_why_it_pauses(world: FederationWorld, server: str) -> None:
    with raw_site(world, server, world.identity("site", SITES[1])) as site:
        site.say(pack(Away(why="a reason")))
        with pytest.raises(CallFailed) as caught:
            site.hear(Train)
    status, details = status_of(caught.value)
    assert status == "FAILED_PRECONDITION"
    assert "pauses: a reason" in details


def test_guests_outlive_the_broker_that_issued_their_certificates(tmp_path: Path) -> None:
    """Each hears of the new broker at a renewal of its own; until then neither has what the other now wants."""
    world = found_federation(tmp_path)
    hub, north = [world.identity("server", SERVER)], [world.identity("site", SITES[0])]
    with (
        world.server(identity=lambda: hub[0]) as address,
        world.site(address, SITES[0], identity=lambda: north[0], pause=30.0, patience=30.0) as running,
    ):
        world.replace_issuer(tmp_path)
        assert wait_until(
            lambda: any("paused: " in line and "no broker of this charter" in line for line in world.told)
        )
        north[0] = world.recertified(north[0])
        assert not wait_until(lambda: running.error is not None, 2)
        hub[0] = world.recertified(hub[0])
        connected = "is connected to the attested server"
        assert wait_until(lambda: sum(connected in line for line in world.told) == 2, 20), world.told
        assert running.error is None
