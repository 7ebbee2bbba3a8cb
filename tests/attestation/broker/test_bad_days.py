"""Disk full, database gone, clock jumped: the broker refuses, says why, and recovers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.clock import CheckedClock
from attestation.broker.storage import Storage, open_storage
from attestation.connection import BrokerClient
from attestation.errors import BrokerUnavailable
from attestation.ledger.entry import Entry

AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.generate()
ORIGIN = "virtual.trial/broker/one/ledger"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    opened = open_storage(f"sqlite:///{tmp_path}/state/broker.sqlite", ORIGIN, KEY)
    yield opened
    opened.close()


def append(storage: Storage, size: int = 10) -> int:
    return storage.transact_now(lambda step: step.append(Entry("job", AT, {"x": "y" * size})))[0]


def test_a_full_disk_refuses_and_recovers_when_there_is_room(storage: Storage) -> None:
    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")

    pages = [40]
    sa.event.listen(storage.database.engine, "checkout", limit)
    append(storage)
    with pytest.raises(BrokerUnavailable, match="full"):
        storage.transact_now(lambda step: [step.append(Entry("job", AT, {"x": "y" * 20_000})) for _ in range(20)])
    size = storage.read(lambda step: step.size())
    assert storage.read(lambda step: step.head()).size == size
    pages[0] = 100_000
    assert append(storage, 20_000) == size


def test_a_database_that_is_gone_refuses_and_recovers_when_it_is_back(storage: Storage, tmp_path: Path) -> None:
    append(storage)
    folder = tmp_path / "state"
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(BrokerUnavailable, match="removed or replaced"):
        append(storage)
    (tmp_path / "elsewhere").rename(folder)
    assert append(storage) == 1
    (folder / "broker.sqlite").rename(folder / "old.sqlite")
    (folder / "broker.sqlite").write_bytes((folder / "old.sqlite").read_bytes())
    with pytest.raises(BrokerUnavailable, match="removed or replaced"):
        append(storage)


class Clocks:
    """A wall clock that is set, and one that only runs."""

    def __init__(self) -> None:
        self.wall = AT
        self.running = 1000.0

    def pass_by(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.running += seconds


def test_a_clock_that_jumps_is_not_believed_until_it_is_set_right() -> None:
    clocks = Clocks()
    clock = CheckedClock(AT, wall=lambda: clocks.wall, running=lambda: clocks.running)
    clocks.pass_by(86_400 * 30)
    assert clock() == AT + timedelta(days=30)
    for jump in (3600, -3600, 61, -61):
        clocks.wall += timedelta(seconds=jump)
        with pytest.raises(BrokerUnavailable, match="jumped by"):
            clock()
        clocks.wall -= timedelta(seconds=jump)
        assert clock() == clocks.wall
    clocks.wall += timedelta(seconds=30)
    assert clock() == clocks.wall


def test_a_broker_in_the_past_of_its_own_ledger_decides_nothing() -> None:
    clocks = Clocks()
    clock = CheckedClock(AT + timedelta(hours=1), wall=lambda: clocks.wall, running=lambda: clocks.running)
    with pytest.raises(BrokerUnavailable, match="before the ledger's last entry"):
        clock()
    clocks.pass_by(3600)
    assert clock() == AT + timedelta(hours=1)


def test_a_broker_without_its_database_says_so_and_recovers(broker: Any, world: Any, guests: Any) -> None:
    guest = guests("site", "north")
    guest.attest()
    state = broker.folder / "state"
    state.rename(broker.folder / "elsewhere")
    with pytest.raises(BrokerUnavailable, match="removed or replaced"):
        guest.release("borealis-hospital/key/data")
    (broker.folder / "elsewhere").rename(state)
    assert guest.release("borealis-hospital/key/data") == b"north's data key"
    client = BrokerClient(broker.entry, "virtual.trial")
    assert json.loads(client._connection.call("GET", "/healthz")[1])["ready"]
    client.close()
