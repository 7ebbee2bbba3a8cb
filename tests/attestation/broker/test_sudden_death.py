"""`kill -9` in the middle of everything: no entry that a client was told of is lost, nothing is released unlogged."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attestation.broker.storage import read_database
from attestation.client import GuestSession
from attestation.errors import BrokerUnavailable
from attestation.ledger.checkpoint import open_checkpoint
from attestation.ledger.entry import parse_entry
from attestation.ledger.tree import verify_consistency
from policies.errors import Refused, SealwrightError

SITE_KEY = "borealis-hospital/key/data"
left_to_the_collector = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
"""urllib3 closes the plain socket, not the TLS one, of a connection that is reset before its handshake begins."""


def hammer(world: Any, ended: threading.Event, released: list[bytes], told: list[int]) -> None:
    """Attest and take the key again and again; note every release that was had, and every receipt."""
    guest: GuestSession | None = None
    while not ended.is_set():
        try:
            if guest is None:
                guest = world.guest("site", "north", timeout=2.0)
                guest.attest()
            released.append(guest.release(SITE_KEY))
            told.append(guest.record("job", {"n": len(told)}).index)
        except (SealwrightError, BrokerUnavailable):
            if guest is not None:
                guest.close()
            guest = None
    if guest is not None:
        guest.close()


def kill_and_look(world: Any, tools: Any, folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    broker = tools.start_broker(folder, world.entries[0])
    tools.deposit_all(world, broker.entry)
    ended, released, told = threading.Event(), list[bytes](), list[int]()
    threads = [threading.Thread(target=hammer, args=(world, ended, released, told)) for _ in range(3)]
    for thread in threads:
        thread.start()
    database = folder / "state/broker.sqlite"
    key, origin = world.broker_key().public_key(), "virtual.trial/broker/one/ledger"
    before = None
    try:
        for _ in range(kills):
            ended.wait(chance.uniform(0.0, 0.4))
            broker.stop(signal.SIGKILL)
            seen = len(released)
            broker = tools.start_broker(folder, world.entries[0])
            note = read_database(database, lambda step: step.head().checkpoint)
            head = open_checkpoint(note, origin, key)
            if before is not None:
                old = before
                proof = read_database(database, lambda step, n=old.size, m=head.size: step.consistency(n, m))
                assert verify_consistency(old.size, head.size, old.root, head.root, proof)
            before = head
            logged = read_database(database, lambda step: step.count("release", resource=SITE_KEY))
            assert logged >= seen
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=30)
        with suppress(Refused):
            broker.stop()
        gc.collect()  # such sockets are this test's, not the next one's
    entries = read_database(database, lambda step: step.entries(0, step.size()))
    assert all(parse_entry(entries[index]).kind == "job" for index in told)
    assert len(released) > kills / 4
    assert set(released) == {b"north's data key"}


@left_to_the_collector
def test_a_killed_broker_loses_nothing_that_it_told(world: Any, tools: Any, audited: Any) -> None:
    kill_and_look(world, tools, world.folder / "one", kills=2, seed=1)


@left_to_the_collector
@pytest.mark.long
def test_a_broker_killed_two_hundred_times_loses_nothing(
    tmp_path: Path, virtual_vendor: Any, virtual_chips: Any, tools: Any
) -> None:
    fresh = tools.found_world(tmp_path, virtual_vendor, virtual_chips, ("one",))
    kill_and_look(fresh, tools, tmp_path / "one", kills=int(os.environ.get("SEAL_KILLS", "200")), seed=2)
