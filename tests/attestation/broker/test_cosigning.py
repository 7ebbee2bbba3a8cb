"""Rounds of cosigning: a database, its writer and real witnesses over TLS, without the broker around them."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from postgres_server import PASSWORD
from witness_world import free_port

from attestation.broker.clock import now
from attestation.broker.config import create_broker
from attestation.broker.keys import load_issuer
from attestation.broker.listening import ServerTls, listening
from attestation.broker.storage import Storage, Transaction, key_name, open_storage
from attestation.errors import BrokerUnavailable
from attestation.ledger.checkpoint import Checkpoint, ledger_origin, sign_checkpoint
from attestation.ledger.cosignature import ledger_of
from attestation.ledger.entry import Entry
from attestation.ledger.receipt import Receipt, check_receipt
from attestation.ledger.tree import MemoryTree
from attestation.ledger.witness import AddCheckpoint
from attestation.witness.config import create_witness
from attestation.witness.http import WITNESS, routes
from attestation.witness.service import Answer, Witness
from attestation.witness.store import WitnessStore, create_store, open_store
from policies.documents import BrokerEntry, Consortium, Member, VirtualRoot
from policies.documents import Witness as WitnessEntry
from policies.errors import Unusable
from policies.keys import load_private_key, public_pem

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""A server's loop here ends while its peers still hold connections, as a process may that ends."""
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
MEMBERS = ("acme-pharma", "borealis-hospital", "cygnus-bio")


def entry(number: int) -> Entry:
    return Entry("job", AT, {"n": number})


class Watched(Witness):
    """A witness that can be slow, and counts."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds = 0.0
        self.answers: list[Answer] = []

    def add_checkpoint(self, raw: bytes) -> Answer:
        time.sleep(self.seconds)
        answer = super().add_checkpoint(raw)
        self.answers.append(answer)
        return answer

    def cosigned(self) -> int:
        return sum(answer.status == 200 for answer in self.answers)


@dataclass
class Served:
    """A witness on a thread of this process, behind real TLS."""

    folder: Path
    entry: WitnessEntry
    listen: str
    consortium: Consortium | None = None
    witness: Watched = field(init=False)
    _ended: asyncio.Event | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    def start(self) -> Served:
        up = threading.Event()

        async def serve() -> None:
            self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
            issuer = load_issuer(self.folder / "keys/issuer.pem", self.entry.issuer_certificate or "")
            tls = ServerTls(issuer, self.entry.name, ["witness"])
            tls.renew(now())
            app = web.Application()
            app[WITNESS] = self.witness
            app.add_routes(routes)
            async with listening(app, tls, self.listen):
                up.set()
                await self._ended.wait()
            await connections_ended()

        key = load_private_key(self.folder / "keys/witness.pem")
        self.witness = Watched(key, open_store(self.folder / "state/witness.sqlite"), lambda: self.consortium, now)
        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        assert up.wait(10)
        return self

    def stop(self) -> None:
        if self._loop is not None and self._ended is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(timeout=20)
            self.witness.close()
            self._loop = None


async def connections_ended() -> None:
    """Wait for connections over TLS, which end in later turns of the loop, when their peers say goodbye."""
    transports = asyncio.get_running_loop()._transports  # type: ignore[attr-defined]
    for _ in range(20):
        if not any(transport._sock for transport in list(transports.values())):
            return
        await asyncio.sleep(0.05)
    for transport in list(transports.values()):
        transport.abort()
    await asyncio.sleep(0.05)


@dataclass
class Stage:
    """A broker's storage with its witnesses."""

    folder: Path
    broker: BrokerEntry
    key: Ed25519PrivateKey
    witnesses: list[Served]
    consortium: Consortium

    def open(self, name: str = "broker", *, postgres: str | None = None) -> Storage:
        """The database of this name here, or the one at a PostgreSQL URL."""
        origin = ledger_origin(self.consortium.trust_domain, self.broker.name)
        url, password = (postgres, PASSWORD) if postgres else (f"sqlite:///{self.folder}/{name}.sqlite", None)
        storage = open_storage(url, origin, self.key, password=password)
        storage.cosigner.follow(self.consortium, self.broker)
        return storage

    def append(self, storage: Storage, number: int) -> Receipt:
        _, receipts = storage.transact_now(lambda step: step.append(entry(number)))
        check_receipt(receipts[0], entry(number).to_bytes(), ledger_of(self.consortium, self.broker))
        return receipts[0]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    broker = create_broker(
        tmp_path / "one", name="one", member=MEMBERS[0], url="https://127.0.0.1:1", listen="127.0.0.1:1", at=now()
    )
    served = []
    for number, member in enumerate((MEMBERS[1], MEMBERS[2], MEMBERS[1]), 1):
        listen = f"127.0.0.1:{free_port()}"
        folder = tmp_path / f"w{number}"
        made = create_witness(
            folder, name=f"w{number}", member=member, url=f"https://{listen}", listen=listen, at=now()
        )
        served.append(Served(folder, made, listen))
    consortium = Consortium(
        name="trial",
        platform="virtual",
        trust_domain="virtual.trial",
        members=tuple(Member(name=m, public_key=public_pem(Ed25519PrivateKey.generate())) for m in MEMBERS),
        brokers=(broker,),
        witnesses=tuple(one.entry for one in served),
        threshold=2,
        witness_threshold=2,
        virtual_roots=(VirtualRoot(product="Milan", ark_spki_sha256="0" * 64),),
    )
    for one in served:
        one.consortium = consortium
        one.start()
    yield Stage(tmp_path, broker, load_private_key(tmp_path / "one/keys/signing.pem"), served, consortium)
    for one in served:
        one.stop()


@pytest.fixture
def storage(stage: Stage) -> Iterator[Storage]:
    opened = stage.open()
    yield opened
    opened.close()


def test_sixty_four_at_once_cost_few_rounds(stage: Stage, storage: Storage) -> None:
    for one in stage.witnesses:
        one.witness.seconds = 0.1

    async def all_at_once() -> list[tuple[int, tuple[Receipt, ...]]]:
        steps = (storage.transact(lambda step, n=n: step.append(entry(n))) for n in range(64))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        return list(await asyncio.gather(*steps))

    answers = asyncio.run(all_at_once())
    assert sorted(index for index, _ in answers) == list(range(64))
    ledger = ledger_of(stage.consortium, stage.broker)
    for number, (_, receipts) in enumerate(answers):
        check_receipt(receipts[0], entry(number).to_bytes(), ledger)
    for one in stage.witnesses:
        assert one.witness.cosigned() <= 8


def test_the_slowest_does_not_delay(stage: Stage, storage: Storage) -> None:
    """One witness of three hangs: it gets a few of the heads, and nothing waits for it."""
    stage.witnesses[2].witness.seconds = 1.0
    start = time.monotonic()
    for number in range(20):
        stage.append(storage, number)
    assert stage.witnesses[2].witness.cosigned() <= time.monotonic() - start + 1
    assert stage.witnesses[0].witness.cosigned() == stage.witnesses[1].witness.cosigned() >= 20


def test_steps_that_append_nothing_do_not_wait(stage: Stage, storage: Storage) -> None:
    for one in stage.witnesses:
        one.stop()
    assert storage.transact_now(lambda step: step.size()) == (0, ())
    with pytest.raises(BrokerUnavailable, match=r"0 of the 2 witnesses.*w1.*w2.*w3"):
        stage.append(storage, 0)
    assert storage.read(lambda step: (step.size(), step.head().size)) == (1, 1)
    for one in stage.witnesses[:2]:
        one.start()
    assert stage.append(storage, 1).index == 1


def test_the_cosigned_head_is_kept(stage: Stage) -> None:
    storage = stage.open()
    receipt = stage.append(storage, 0)
    storage.close()
    again = stage.open()
    try:
        assert again.read(Transaction.published).checkpoint == receipt.checkpoint
        assert stage.append(again, 1).index == 1
    finally:
        again.close()


def test_a_fork_has_no_receipt(stage: Stage, storage: Storage) -> None:
    """Two databases that part after the third entry, one key: whichever asks first goes on, the other is refused."""
    for number in range(3):
        stage.append(storage, number)
    storage.close()
    shutil.copy(stage.folder / "broker.sqlite", stage.folder / "second.sqlite")
    first, second = stage.open(), stage.open("second")
    try:
        stage.append(first, 3)
        with pytest.raises(BrokerUnavailable, match="forked"):
            stage.append(second, 103)  # as long as the first, with another root
        with pytest.raises(BrokerUnavailable, match="forked"):
            stage.append(second, 104)  # longer, and no continuation
        assert second.cosigner.problem is not None
        for number in range(4, 8):
            stage.append(first, number)
        with pytest.raises(BrokerUnavailable, match="cosigned 8 entries of this ledger, which has 6"):
            stage.append(second, 105)
        assert first.cosigner.problem is None
    finally:
        first.close()
        second.close()


def test_a_restored_database_is_noticed(stage: Stage, storage: Storage) -> None:
    stage.append(storage, 0)
    storage.close()
    shutil.copy(stage.folder / "broker.sqlite", stage.folder / "older.sqlite")
    newer = stage.open()
    for number in range(1, 6):
        stage.append(newer, number)
    newer.close()
    older = stage.open("older")
    try:
        with pytest.raises(BrokerUnavailable, match="an older database was put in place"):
            stage.append(older, 9)
        assert "older database" in (older.cosigner.problem or "")
    finally:
        older.close()


def test_a_broker_with_a_new_key_goes_on_with_its_ledger_or_not_at_all(stage: Stage, storage: Storage) -> None:
    """Another key by the members' decision is no occasion to forget: a fresh database under the old name is refused."""
    for number in range(3):
        stage.append(storage, number)
    stage.key = Ed25519PrivateKey.generate()
    stage.broker = stage.broker.model_copy(update={"signing_key": public_pem(stage.key)})
    stage.consortium = Consortium(**{**dict(stage.consortium), "brokers": (stage.broker,)})
    storage.add_key(stage.key)
    storage.cosigner.follow(stage.consortium, stage.broker)
    time.sleep(0.1)  # a round in between finds a head that the old key signed
    storage.transact_now(lambda step: step.set_signing_key(key_name(stage.key.public_key())))
    with pytest.raises(BrokerUnavailable, match="does not know the key"):
        stage.append(storage, 3)
    for one in stage.witnesses:
        one.consortium = stage.consortium
    assert stage.append(storage, 4).index == 4
    storage.close()
    fresh = stage.open("fresh")
    try:
        with pytest.raises(BrokerUnavailable, match="cosigned 5 entries of this ledger, which has 1"):
            stage.append(fresh, 0)
    finally:
        fresh.close()


@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL"])
def test_two_processes_on_one_database(stage: Stage, kind: str, request: pytest.FixtureRequest) -> None:
    """Each gets the newest head cosigned, whoever committed it, and takes what the other got."""
    url = None if kind == "SQLite" else request.getfixturevalue("postgres").create("cosigned")
    both = [stage.open(postgres=url), stage.open(postgres=url)]
    try:
        with ThreadPoolExecutor(8) as pool:
            numbers = range(40)
            receipts = list(pool.map(lambda number: stage.append(both[number % 2], number), numbers))
        assert sorted(receipt.index for receipt in receipts) == list(range(40))
        assert all(storage.cosigner.problem is None for storage in both)
    finally:
        for storage in both:
            storage.close()


def test_a_charter_that_demands_other_numbers(stage: Stage, storage: Storage) -> None:
    """Three of three, then none: what is demanded of the next answer is what the charter followed then says."""
    stage.append(storage, 0)
    stage.consortium = Consortium(**{**dict(stage.consortium), "witness_threshold": 3})
    storage.cosigner.follow(stage.consortium, stage.broker)
    stage.append(storage, 1)
    stage.witnesses[0].stop()
    with pytest.raises(BrokerUnavailable, match="of the 3 witnesses"):
        stage.append(storage, 2)
    stage.consortium = Consortium(**{**dict(stage.consortium), "witness_threshold": 0})
    storage.cosigner.follow(stage.consortium, stage.broker)
    assert stage.append(storage, 3).checkpoint.count("\N{EM DASH}") == 1
    assert storage.read(lambda step: step.published()).size == 4


def test_a_witness_whose_answers_are_another_s(stage: Stage, storage: Storage) -> None:
    """Who answers with another key than the charter's has not cosigned; two good ones are enough."""
    stage.witnesses[0].witness._key = Ed25519PrivateKey.generate()
    stage.append(storage, 0)
    stage.witnesses[1].stop()
    with pytest.raises(BrokerUnavailable, match="witness w1: it cosigned with another key"):
        stage.append(storage, 1)


def test_who_is_not_the_witness_by_its_certificate_is_not_asked(stage: Stage) -> None:
    """The charter pins another certificate than the one that w1 shows: it has not cosigned."""
    first, second, third = (one.entry for one in stage.witnesses)
    swapped = first.model_copy(update={"issuer_certificate": second.issuer_certificate})
    stage.consortium = Consortium(**{**dict(stage.consortium), "witnesses": (swapped, second, third)})
    stage.witnesses[1].stop()
    storage = stage.open()
    try:
        with pytest.raises(BrokerUnavailable, match="witness w1 cannot be reached: SSLError"):
            stage.append(storage, 0)
        unpinned = first.model_copy(update={"issuer_certificate": None})
        stage.consortium = Consortium(**{**dict(stage.consortium), "witnesses": (unpinned, second, third)})
        storage.cosigner.follow(stage.consortium, stage.broker)
        stage.append(storage, 1)
    finally:
        storage.close()


# --- the state of a witness -------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WitnessStore]:
    create_store(tmp_path / "state/witness.sqlite")
    opened = open_store(tmp_path / "state/witness.sqlite")
    yield opened
    opened.close()


def grown(size: int, mark: str) -> MemoryTree:
    tree = MemoryTree()
    for number in range(size):
        tree.append(f"{mark}{number}".encode())
    return tree


def test_of_two_requests_from_one_state_one_wins(stage: Stage) -> None:
    """First requests of a ledger, thirty forks at once: one is cosigned, the others hear of its size."""
    witness = stage.witnesses[0].witness
    origin = ledger_origin("virtual.trial", "one")
    requests = [
        AddCheckpoint(0, (), sign_checkpoint(Checkpoint(origin, 3, grown(3, f"{n}-").root()), stage.key)).to_bytes()
        for n in range(30)
    ]
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(witness.add_checkpoint, requests))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 29
    assert {answer.body for answer in answers if answer.status == 409} == {"3\n"}


def test_a_state_goes_one_step_from_what_it_was(store: WitnessStore, tmp_path: Path) -> None:
    first, second, fork = (Checkpoint("log", size, bytes([mark]) * 32) for size, mark in ((1, 1), (2, 2), (2, 3)))
    assert store.seen("log") is None
    assert store.advance(None, first)
    assert not store.advance(None, fork)
    assert store.advance(first, second)
    assert not store.advance(first, fork)
    assert not store.advance(Checkpoint("log", 2, bytes(32)), fork)
    assert store.seen("another log") is None
    other = open_store(tmp_path / "state/witness.sqlite")
    try:
        assert other.seen("log") == second
    finally:
        other.close()


def test_a_state_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "state/witness.sqlite"
    with pytest.raises(Unusable, match="gone"):
        open_store(path)
    create_store(path)
    with pytest.raises(Unusable, match="exists"):
        create_store(path)
    path.write_bytes(b"no database at all, by its first bytes")
    with pytest.raises(Unusable, match="no witness's state"):
        open_store(path)


@pytest.mark.parametrize("named", [False, True])
def test_a_witness_that_no_charter_names_cosigns_nothing(stage: Stage, named: bool) -> None:
    served, origin = stage.witnesses[0], ledger_origin("virtual.trial", "one")
    others = Consortium(**{**dict(stage.consortium), "witnesses": stage.consortium.witnesses[1:]})
    served.consortium = others if named else None
    request = AddCheckpoint(0, (), sign_checkpoint(Checkpoint(origin, 1, bytes(32)), stage.key))
    assert served.witness.add_checkpoint(request.to_bytes()).status == 404
