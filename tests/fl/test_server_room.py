"""The server's memory for updates is bounded, whatever the number of sites; nothing waits for ever for it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from federation_world import SITES, found_federation, make_job, wait_until

from fl.server import room
from fl.server.room import Room


def test_one_waits_for_another_and_a_large_one_gets_in_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROOM", 10)
    shared, most, lock = Room(), [0], threading.Lock()

    def use(size: int) -> None:
        shared.take(size)
        with lock:
            most[0] = max(most[0], shared.taken)
        threading.Event().wait(0.01)
        shared.give_back(size)

    threads = [threading.Thread(target=use, args=(size,)) for size in (4, 4, 4, 4, 4, 4, 9, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert 0 < most[0] <= 10
    shared.take(50)
    assert shared.taken == 50


def test_nobody_waits_for_room_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROOM", 10)
    monkeypatch.setattr(room, "WAIT_SECONDS", 0.1)
    shared = Room()
    shared.take(10)
    shared.take(10)
    assert shared.taken == 20


def test_updates_are_in_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for two, both count, and all room is given back."""
    monkeypatch.setattr(room, "ROOM", 1)
    made: list[Room] = []
    most: list[int] = []

    class Watched(Room):
        def __init__(self, limit: int | None = None) -> None:
            super().__init__(limit)
            made.append(self)

        def take(self, size: int) -> None:
            super().take(size)
            most.append(self.taken // size)

    monkeypatch.setattr("fl.server.service.Room", Watched)
    world = found_federation(tmp_path)
    bundle, model = make_job(tmp_path, num_rounds=2)
    world.approve(bundle)
    with (
        world.server() as address,
        world.site(address, SITES[0], number=1.0),
        world.site(address, SITES[1], number=3.0),
        world.client(address) as client,
    ):
        mine = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        assert [event.text for event in client.watch(mine, timeout=60)][-1] == "finished"
        assert wait_until(lambda: made[0].taken == 0)
    assert most == [1, 1, 1, 1]
