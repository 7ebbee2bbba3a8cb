"""Answers leave when as many witnesses as the charter demands have cosigned the ledger: real brokers and witnesses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from witness_world import WitnessProcess, add_witnesses

from attestation.broker.storage import read_database
from attestation.client import GuestSession
from attestation.connection import Connection
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.evidence.report import Product
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import CHECKPOINT, export_bundle
from attestation.ledger.checkpoint import parse_note
from attestation.ledger.cosignature import Ledger, cosigners, ledger_of, open_cosigned
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from attestation.witness.server import FollowedCharter
from policies.charter import write_store
from policies.charter.making import Changes

TWICE_KEY = "borealis-hospital/key/twice"
SITE_KEY = "borealis-hospital/key/data"
Guests = Callable[..., GuestSession]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any
) -> Any:
    """A consortium with one broker, of acme-pharma."""
    folder = tmp_path_factory.mktemp("witnessed")
    return tools.found_world(folder, virtual_vendor, virtual_chips, ("one",), lease_seconds=900)


@pytest.fixture(scope="module")
def witnesses(world: Any) -> Iterator[list[WitnessProcess]]:
    """Three witnesses of the two other members; two of them must cosign."""
    found = add_witnesses(world, ["borealis-hospital", "cygnus-bio", "borealis-hospital"], threshold=2)
    yield found
    for one in found:
        one.stop()


@pytest.fixture(scope="module")
def broker(world: Any, witnesses: list[WitnessProcess], tools: Any) -> Iterator[Any]:
    """The broker, restarted by tests that stop it: `broker.now` is the running one."""

    class Running:
        folder = world.folder / "one"

        def start(self) -> Any:
            self.now = tools.start_broker(self.folder, world.entries[0])
            return self.now

        def stop(self, number: int = signal.SIGTERM) -> None:
            if self.now.process.poll() is None:
                self.now.stop(number)

        @property
        def database(self) -> Path:
            return self.folder / "state/broker.sqlite"

        def health(self) -> dict[str, Any]:
            connection = Connection("one", world.entries[0].url, world.entries[0].issuer_certificate)
            try:
                status, raw = connection.call("GET", "/healthz")
            finally:
                connection.close()
            return {"status": status, **json.loads(raw)}

        def ready(self, seconds: float = 30) -> None:
            """Wait until it is ready."""
            end = time.monotonic() + seconds
            while (state := self.health())["status"] != 200:
                assert time.monotonic() < end, state
                time.sleep(0.1)

    running = Running()
    running.start()
    try:
        running.ready()
        tools.deposit_all(world, world.entries[0])
        yield running
    finally:
        running.stop()


@pytest.fixture
def guests(world: Any, broker: Any) -> Iterator[Guests]:
    made: list[GuestSession] = []

    def make(*place: str, **overrides: Any) -> GuestSession:
        made.append(world.guest(*place, timeout=20.0, **overrides))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


def ledger(world: Any) -> Ledger:
    return ledger_of(world.charter().consortium, world.entries[0])


def sizes(database: Path) -> tuple[int, int]:
    """How many entries there are, and how many are below the published head."""
    found: tuple[int, int] = read_database(database, lambda step: (step.size(), step.published().size))
    return found


def test_every_answer_s_receipt_is_cosigned_by_two_witnesses(world: Any, guests: Guests, broker: Any) -> None:
    guest = guests()
    guest.attest()
    assert guest.release(SITE_KEY) == b"north's data key"
    receipt = guest.record("note", {"said": "x"})
    assert open_cosigned(receipt.checkpoint, ledger(world)).size > receipt.index
    note = broker_head(world)
    assert len(cosigners(parse_note(note), ledger(world).witnesses)) >= 2


def broker_head(world: Any) -> str:
    connection = Connection("one", world.entries[0].url, world.entries[0].issuer_certificate)
    try:
        return connection.call("GET", "/v1/ledger/checkpoint")[1].decode()
    finally:
        connection.close()


def test_a_guest_refuses_a_receipt_that_too_few_have_cosigned(guests: Guests, world: Any) -> None:
    """The charter of this guest demands witnesses that this broker has not asked."""
    guest = guests()
    guest.attest()
    (session,) = guest._sessions.values()
    session.ledger = dataclasses.replace(session.ledger, witnesses={}, threshold=1)
    with pytest.raises(LedgerRefused, match="0 of the 1 witnesses"):
        session.release(SITE_KEY, None)


def test_one_witness_down_stops_nothing_and_two_stop_everything(
    world: Any, broker: Any, witnesses: list[WitnessProcess], guests: Guests
) -> None:
    guest = guests()
    guest.attest()
    witnesses[0].stop()
    assert guest.release(SITE_KEY) == b"north's data key"
    assert broker.health()["status"] == 200
    witnesses[1].stop()
    before, _ = sizes(broker.database)
    with pytest.raises(BrokerUnavailable, match="witnesses that have to cosign") as refused:
        guest.release(SITE_KEY)
    told = str(refused.value)
    assert "w1" in told
    assert "w2" in told
    assert "w3" not in told
    after, published = sizes(broker.database)
    assert after > before >= published, "the entry stays, and is shown to nobody"
    health = broker.health()
    assert (health["status"], health["ready"]) == (503, False)
    assert "w1" in health["problems"][0]
    other = guests()
    with pytest.raises(BrokerUnavailable, match="w1"):
        other.attest()
    witnesses[0].start()
    broker.ready()
    assert guest.release(SITE_KEY) == b"north's data key"
    other.attest()
    witnesses[1].start()


def test_what_was_refused_for_want_of_witnesses_counts(
    broker: Any, witnesses: list[WitnessProcess], guests: Guests
) -> None:
    """A key that may leave twice a boot: one release that stayed inside is one of the two."""
    guest = guests()
    guest.attest()
    assert guest.release(TWICE_KEY) == b"twice a boot at most"
    witnesses[0].stop()
    witnesses[1].stop()
    with pytest.raises(BrokerUnavailable):
        guest.release(TWICE_KEY)
    for one in witnesses[:2]:
        one.start()
    broker.ready()
    with pytest.raises(Exception, match="not again in this boot"):
        guest.release(TWICE_KEY)


def test_killed_between_commit_and_cosignature(
    broker: Any, witnesses: list[WitnessProcess], guests: Guests, world: Any
) -> None:
    """Witnesses that hang hold an answer back; the broker dies; its successor has the head cosigned before all else."""
    guest = guests()
    for one in witnesses:
        one.send(signal.SIGSTOP)
    before, _ = sizes(broker.database)
    failure: list[BaseException] = []

    def attest() -> None:
        try:
            guest.attest()
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=attest)
    thread.start()
    try:
        end = time.monotonic() + 30
        while sizes(broker.database)[0] == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        broker.stop(signal.SIGKILL)
    finally:
        for one in witnesses:
            one.send(signal.SIGCONT)
    thread.join(timeout=60)
    assert isinstance(failure[0], BrokerUnavailable)
    size, published = sizes(broker.database)
    assert published < size, "it died before the head was cosigned"
    broker.start()
    broker.ready()
    note = broker_head(world)
    assert open_cosigned(note, ledger(world)).size >= size, "without anyone's asking"


def test_a_bundle_without_its_cosignatures_is_refused(world: Any, broker: Any, guests: Guests, tmp_path: Path) -> None:
    guests().attest()
    bundle = tmp_path / "audit"
    time.sleep(0.3)  # the cosigned head is kept with a commit of its own, after the answer
    count, beyond = read_database(broker.database, lambda step: export_bundle(step, bundle))
    assert count > 0
    assert beyond == 0
    report = verify_audit(bundle, world.root)
    assert report.problems == ()
    whole = (bundle / CHECKPOINT).read_text()
    text, _, lines = whole.partition("\n\n")
    for kept in (1, 2):
        bare = f"{text}\n\n" + "".join(line + "\n" for line in lines.splitlines()[:kept])
        (bundle / CHECKPOINT).write_text(bare)
        for number in range(count):
            path = bundle / f"receipts/{number:08d}.json"
            path.write_bytes(
                path.read_bytes().replace(json.dumps(whole)[1:-1].encode(), json.dumps(bare)[1:-1].encode())
            )
        problems = {problem.file: problem.reason for problem in verify_audit(bundle, world.root).problems}
        assert f"{kept - 1} of the 2 witnesses that are needed" in problems[CHECKPOINT]
        whole = bare


@pytest.mark.parametrize("what", ["restored", "forked"])
def test_an_older_database_and_a_second_broker_are_refused(
    what: str, world: Any, broker: Any, guests: Guests, tmp_path: Path, tools: Any
) -> None:
    """Counters are not refilled: what the older database has forgotten, the witnesses have not."""
    guest = guests()
    guest.attest()
    broker.stop()
    older = tmp_path / "older.sqlite"
    shutil.copy(broker.database, older)
    broker.start()
    broker.ready()
    for _ in range(2):
        assert guest.release(TWICE_KEY) == b"twice a boot at most"
    other = guests()
    for _ in range(3):
        other.attest()
    newest = tmp_path / "newest.sqlite"
    broker.stop()
    shutil.copy(broker.database, newest)
    shutil.copy(older, broker.database)
    try:
        broker.start()
        if what == "forked":  # it goes its own way until it is longer than what the witnesses know
            lone = guests()
            end = time.monotonic() + 60
            while sizes(broker.database)[0] <= read_database(newest, lambda step: step.size()) + 2:
                assert time.monotonic() < end
                with pytest.raises(BrokerUnavailable):
                    lone.attest()
        second = guests()
        with pytest.raises(BrokerUnavailable, match="forked" if what == "forked" else "an older database was put in"):
            second.attest()
        with pytest.raises(BrokerUnavailable):
            guest.release(TWICE_KEY)
        health = broker.health()
        assert health["status"] == 503
        assert "witness w1" in health["problems"][0]
    finally:
        broker.stop()
        shutil.copy(newest, broker.database)
        broker.start()
        broker.ready()
    with pytest.raises(Exception, match="not again in this boot"):
        guest.release(TWICE_KEY)


def test_a_witness_that_was_killed_has_not_forgotten(
    broker: Any, witnesses: list[WitnessProcess], guests: Guests
) -> None:
    guests().attest()
    for one in witnesses:
        one.stop(signal.SIGKILL)
    for one in witnesses:
        one.start()
    broker.ready()
    guests().attest()


def test_a_witness_alone_follows_newer_charters_and_never_an_older_one(
    world: Any, broker: Any, witnesses: list[WitnessProcess], tmp_path: Path
) -> None:
    older = dict(world.store)
    write_store(tmp_path / "charter", older)
    followed = FollowedCharter(tmp_path / "charter", world.root)
    world.change(Changes(renew=frozenset({"images"})))
    newer = world.charter().version
    assert followed.version < newer
    end = time.monotonic() + 30
    while followed.version < newer:  # the broker looks at its own folder when it is asked
        assert time.monotonic() < end
        assert followed.refresh(datetime.now(UTC)) == []
    assert FollowedCharter(tmp_path / "charter", world.root).version == newer
    write_store(tmp_path / "charter", older)
    followed.refresh(datetime.now(UTC))
    assert followed.version == newer
