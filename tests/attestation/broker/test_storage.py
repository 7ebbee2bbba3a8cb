"""The database: one atomic step for a decision and its entry, batches, and a head that is its tree's."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.sessions import open_session
from attestation.broker.storage import Storage, StoredResource, Transaction, open_storage
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.ledger.checkpoint import open_checkpoint
from attestation.ledger.cosignature import Ledger
from attestation.ledger.entry import Entry
from attestation.ledger.receipt import check_receipt
from attestation.ledger.tree import verify_consistency
from policies.errors import Unusable

KEY = Ed25519PrivateKey.generate()
ORIGIN = "virtual.trial/broker/one/ledger"
AT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def entry(number: int) -> Entry:
    return Entry("job", AT, {"n": number})


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state/broker.sqlite"


@pytest.fixture
def storage(url: str) -> Iterator[Storage]:
    opened = open_storage(url, ORIGIN, KEY)
    yield opened
    opened.close()


def test_what_is_appended_has_its_receipt(storage: Storage) -> None:
    for number in range(5):
        appended = entry(number)
        index, receipts = storage.transact_now(lambda step, appended=appended: step.append(appended))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        assert index == number
        assert (
            check_receipt(receipts[0], appended.to_bytes(), Ledger(ORIGIN, KEY.public_key(), {}, 0)).size == number + 1
        )
    assert storage.read(lambda step: step.entries(1, 3)) == [entry(1).to_bytes(), entry(2).to_bytes()]
    assert storage.read(lambda step: step.entry(9)) is None


def test_steps_at_once_share_commits_and_lose_nothing(storage: Storage) -> None:
    async def all_at_once() -> list[int]:
        steps = (storage.transact(lambda step, n=n: step.append(entry(n))) for n in range(100))  # type: ignore[misc]  # as above
        return [index for index, _ in await asyncio.gather(*steps)]

    assert sorted(asyncio.run(all_at_once())) == list(range(100))
    head = storage.read(Transaction.head)
    assert open_checkpoint(head.checkpoint, ORIGIN, KEY.public_key()).size == head.size == 100


def test_a_step_that_fails_keeps_nothing_and_the_others_stand(storage: Storage) -> None:
    def failing(step: Transaction) -> None:
        step.append(entry(7), blobs={sha256(b"x").hexdigest(): b"x"})
        raise Unusable("no", where="here", do="nothing")

    async def both() -> None:
        first, second, third = await asyncio.gather(
            storage.transact(lambda step: step.append(entry(0))),
            storage.transact(failing),
            storage.transact(lambda step: step.append(entry(1))),
            return_exceptions=True,
        )
        assert isinstance(second, Unusable)
        assert not isinstance(first, BaseException)
        assert not isinstance(third, BaseException)

    asyncio.run(both())
    assert storage.read(Transaction.blob_digests) == []
    assert [b'"n":7' in raw for raw in storage.read(lambda step: step.entries(0, 9))] == [False, False]


def test_it_grows_consistently_and_reopens(url: str) -> None:
    storage = open_storage(url, ORIGIN, KEY)
    storage.transact_now(lambda step: [step.append(entry(n)) for n in range(3)])
    old = open_checkpoint(storage.read(Transaction.head).checkpoint, ORIGIN, KEY.public_key())
    storage.close()
    storage = open_storage(url, ORIGIN, KEY)
    storage.transact_now(lambda step: [step.append(entry(n)) for n in range(4)])
    new = open_checkpoint(storage.read(Transaction.head).checkpoint, ORIGIN, KEY.public_key())
    proof = storage.read(lambda step: step.consistency(old.size, new.size))
    assert verify_consistency(old.size, new.size, old.root, new.root, proof)
    storage.close()


def test_another_ledger_key_or_a_changed_database_is_not_opened(url: str, tmp_path: Path) -> None:
    storage = open_storage(url, ORIGIN, KEY)
    storage.transact_now(lambda step: [step.append(entry(n)) for n in range(3)])
    storage.close()
    with pytest.raises(LedgerRefused):
        open_storage(url, "virtual.trial/broker/two/ledger", KEY)
    with pytest.raises(LedgerRefused):
        open_storage(url, ORIGIN, Ed25519PrivateKey.generate())
    connection = sqlite3.connect(tmp_path / "state/broker.sqlite")
    connection.execute("update nodes set hash = zeroblob(32) where level = 1")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerRefused):
        open_storage(url, ORIGIN, KEY)
    with pytest.raises(Unusable):
        open_storage("mysql://localhost/x", ORIGIN, KEY)


def test_the_database_is_its_owners_alone(storage: Storage, tmp_path: Path) -> None:
    storage.transact_now(lambda step: step.append(entry(0)))
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()} == {0o600}


def test_a_locked_database_refuses_says_so_and_recovers(url: str, tmp_path: Path) -> None:
    storage = open_storage(url, ORIGIN, KEY, busy_seconds=0.2)
    storage.read(lambda step: step.size())
    connection = sqlite3.connect(tmp_path / "state/broker.sqlite", check_same_thread=False)
    connection.execute("begin immediate")
    with pytest.raises(BrokerUnavailable, match="locked"):
        storage.transact_now(lambda step: step.append(entry(0)))
    connection.rollback()
    connection.close()
    assert storage.transact_now(lambda step: step.append(entry(0)))[0] == 0
    storage.close()


def test_counters_sessions_and_resources(storage: Storage) -> None:
    session = open_session(
        "v1", identifier="a" * 32, nonce=bytes(32), guest_nonce="g", at=AT, seconds=60, charter_version=1
    )
    stored = StoredResource("a/b/c", 1, "k", b"w", b"s")

    def work(step: Transaction) -> None:
        step.new_session(session)
        step.put_resource(stored)
        step.append(Entry("release", AT, {}), resource="a/b/c", guest="site/one", boot="00")
        step.append(Entry("release", AT, {}), resource="a/b/c", guest="site/two", boot="01")
        step.append(Entry("denial", AT, {}), resource="a/b/c", guest="site/two", boot="01")

    storage.transact_now(work)
    assert storage.read(lambda step: step.session("a" * 32)) == session
    assert storage.read(lambda step: step.resource("a/b/c")) == stored
    assert storage.read(lambda step: step.count("release", resource="a/b/c")) == 2
    assert storage.read(lambda step: step.count("release", resource="a/b/c", boot="01")) == 1
    assert storage.read(lambda step: step.count("release", resource="a/b/c", guest="site/one")) == 1
    assert storage.read(lambda step: step.last_entry("release")) is not None
    later = AT.replace(minute=2)
    assert storage.transact_now(lambda step: step.prune_sessions(later))[0] == 0
