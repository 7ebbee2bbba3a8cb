"""Our verification against python-tuf's own client: what we accept, it accepts, and what it refuses, we refuse.

python-tuf's client follows a clock of its own, so these charters are founded now. It is more lenient than ours on
purpose (foreign files, forms, delegations that do not follow from the consortium): the other direction is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from charter_world import MEMBERS, World, bundle, compact, image, parsed, signed_by
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.ngclient import FetcherInterface, Updater

from policies.charter import (
    Changes,
    Charter,
    amend,
    found,
    load_charter,
    parse_proposal,
    propose,
    publish,
    read_store,
    sign,
    sign_timestamp,
    write_proposal,
    write_store,
)
from policies.documents import Consortium
from policies.errors import CharterRefused, ProposalRefused


class StoreFetcher(FetcherInterface):
    """Serves a store as a TUF repository over no network at all."""

    def __init__(self, store: dict[str, bytes]) -> None:
        self.store = store

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("https://store/")
        if name not in self.store:
            raise DownloadHTTPError(f"{name} is not there", 404)
        yield self.store[name]


def by_python_tuf(store: dict[str, bytes], root: bytes, folder: Path, paths: list[str]) -> dict[str, bytes]:
    """The targets at `paths` as python-tuf's client gets them. Raises RepositoryError."""
    folder.mkdir()
    (folder / "targets").mkdir()
    updater = Updater(
        str(folder),
        "https://store/metadata/",
        str(folder / "targets"),
        "https://store/targets/",
        StoreFetcher(store),
        bootstrap=root,
    )
    updater.refresh()
    files = {}
    for number, path in enumerate(paths):
        info = updater.get_targetinfo(path)
        if info is None:
            raise RepositoryError(f"{path} is not there")
        files[path] = Path(updater.download_target(info, str(folder / "targets" / str(number)))).read_bytes()
    return files


@pytest.fixture
def world() -> World:
    world = World()
    world.store = found(world.consortium, world.files(), world.keys.values(), [world.broker_key], datetime.now(UTC))
    return world


def test_python_tufs_client_gets_the_same_files(world: World, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    charter = load_charter(world.store, world.root, now)
    paths = sorted(charter.files)
    assert by_python_tuf(world.store, world.root, tmp_path / "first", paths) == charter.files
    world.store = world.amend(world.put(image("two", "00" * 48)), at=now)
    world.store = world.amend(Changes(consortium=world.with_consortium(lease_seconds=30)), at=now)
    charter = load_charter(world.store, world.root, now, known=charter)
    assert charter.version == 3
    assert by_python_tuf(world.store, world.root, tmp_path / "third", sorted(charter.files)) == charter.files


def one_signature(world: World, store: dict[str, bytes]) -> dict[str, bytes]:
    raw = signed_by(parsed(store, "1.snapshot").signed, world.keys["acme-pharma"])
    stamp = parsed(store, "timestamp").signed
    stamp.snapshot_meta.length, stamp.snapshot_meta.hashes = None, None
    return {
        **store,
        "metadata/1.snapshot.json": raw,
        "metadata/timestamp.json": signed_by(stamp, world.broker_key),
    }


def lapsed(world: World, store: dict[str, bytes]) -> dict[str, bytes]:
    stamp = parsed(store, "timestamp").signed
    stamp.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1)
    return {**store, "metadata/timestamp.json": signed_by(stamp, world.broker_key)}


def by_a_member(world: World, store: dict[str, bytes]) -> dict[str, bytes]:
    stamp = parsed(store, "timestamp").signed
    return {**store, "metadata/timestamp.json": signed_by(stamp, world.keys["acme-pharma"])}


def swapped_target(world: World, store: dict[str, bytes]) -> dict[str, bytes]:
    name = next(name for name in store if name.startswith("targets/images/"))
    return {**store, name: store[name].replace(b"demo", b"evil")}


def foreign_root(world: World, store: dict[str, bytes]) -> dict[str, bytes]:
    other = World().found()
    root = parsed(other.store, "1.root").signed
    root.version = 2
    return {**store, "metadata/2.root.json": signed_by(root, *other.keys.values())}


def nonsense(world: World, store: dict[str, bytes]) -> dict[str, bytes]:
    return {**store, "metadata/timestamp.json": compact({"signed": {}})}


@pytest.mark.parametrize("attack", [one_signature, lapsed, by_a_member, swapped_target, foreign_root, nonsense])
def test_both_refuse(
    world: World, tmp_path: Path, attack: Callable[[World, dict[str, bytes]], dict[str, bytes]]
) -> None:
    paths = sorted(load_charter(world.store, world.root, datetime.now(UTC)).files)
    store = attack(world, world.store)
    with pytest.raises(CharterRefused):
        load_charter(store, world.root, datetime.now(UTC))
    with pytest.raises(RepositoryError):
        by_python_tuf(store, world.root, tmp_path / "client", paths)


# --- any history of honest changes ------------------------------------------------------------------------------------

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


class CharterLife(RuleBasedStateMachine):
    """Members change the charter in any order: each version holds, none can be rolled back, half of one never holds."""

    @initialize()
    def founded(self) -> None:
        self.world = World().found()
        self.now = START
        self.seen: list[tuple[dict[str, bytes], Charter]] = []
        self.number = 0
        self.remember()

    def remember(self) -> None:
        known = self.seen[-1][1] if self.seen else None
        charter = load_charter(self.world.store, self.world.root, self.now, known=known)
        assert known is None or charter.version == known.version + 1
        self.seen.append((dict(self.world.store), charter))

    def change(self, changes: Changes, by: tuple[str, ...]) -> None:
        store, keys = self.world.store, [self.world.keys[name] for name in by]
        proposal = propose(store, changes, self.now)
        half = sign(proposal, keys[0], self.now)
        with pytest.raises(ProposalRefused):
            publish(store, half, self.now)
        again = parse_proposal(write_proposal(half), "proposal")
        assert again == half
        for key in keys[1:]:
            again = sign(again, key, self.now)
        new = publish(store, again, self.now)
        with pytest.raises(CharterRefused):
            load_charter(new, self.world.root, self.now)
        self.world.store = sign_timestamp(new, self.world.broker_key, self.now)
        self.remember()

    @rule(pair=st.permutations(MEMBERS))
    def add_image(self, pair: list[str]) -> None:
        self.number += 1
        self.change(self.world.put(image(f"image-{self.number}", f"{self.number:096x}")), (pair[0], pair[1]))

    @rule(pair=st.permutations(MEMBERS))
    def approve_bundle(self, pair: list[str]) -> None:
        self.number += 1
        self.change(self.world.put(bundle(f"{self.number:064x}")), (pair[0], pair[1]))

    @rule(pair=st.permutations(MEMBERS), which=st.integers(0, 100))
    def remove_something_shared(self, pair: list[str], which: int) -> None:
        paths = [path for path in self.seen[-1][1].files if not path.startswith("members/")]
        if paths:
            self.change(Changes(remove=frozenset({paths[which % len(paths)]})), (pair[0], pair[1]))

    @rule(pair=st.permutations(MEMBERS), lease=st.integers(5, 3600))
    def change_the_lease(self, pair: list[str], lease: int) -> None:
        consortium: Consortium = self.seen[-1][1].consortium
        if lease != consortium.lease_seconds:
            wanted = consortium.model_copy(update={"lease_seconds": lease})
            self.change(Changes(consortium=wanted), (pair[0], pair[1]))

    @rule(hours=st.integers(1, 20))
    def time_passes(self, hours: int) -> None:
        self.now += timedelta(hours=hours)
        self.world.store = sign_timestamp(self.world.store, self.world.broker_key, self.now)
        charter = load_charter(self.world.store, self.world.root, self.now, known=self.seen[-1][1])
        self.seen[-1] = (dict(self.world.store), charter)

    @invariant()
    def nothing_can_be_rolled_back(self) -> None:
        if not self.seen:
            return
        _, latest = self.seen[-1]
        for store, charter in self.seen[:-1][-3:]:
            fresh = sign_timestamp(store, self.world.broker_key, self.now)
            with pytest.raises(CharterRefused):
                load_charter(fresh, self.world.root, self.now, known=latest)
            assert load_charter(store, self.world.root, charter.expires - timedelta(seconds=1)).files == charter.files


CharterLife.TestCase.settings = settings(
    max_examples=4, stateful_step_count=6, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestCharterLife = CharterLife.TestCase


def test_stores_are_written_and_read_whole(world: World, tmp_path: Path) -> None:
    write_store(tmp_path / "charter", world.store)
    assert read_store(tmp_path / "charter") == world.store
    old = set(world.store)
    world.store = amend(
        world.store,
        Changes(remove=frozenset({"images/demo.json"})),
        [world.keys[name] for name in MEMBERS[:2]],
        [world.broker_key],
        datetime.now(UTC),
    )
    write_store(tmp_path / "charter", world.store)
    assert read_store(tmp_path / "charter") == world.store
    assert old - set(world.store)
    (tmp_path / "charter" / "metadata" / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(Exception, match="cannot be read"):
        read_store(tmp_path / "charter")
