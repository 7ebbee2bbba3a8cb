"""Brokers sign the charter's timestamp together: by themselves, whoever of them is away, and only for what holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from attestation.broker.charters import TIMESTAMP, CharterFolder
from attestation.broker.stamping import stamping_round
from attestation.canonical import b64, canonical_bytes, unb64
from attestation.client import BrokerClient
from attestation.errors import BrokerRefused
from attestation.evidence.report import Product
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter import load_charter, read_store, sign_timestamp, write_store
from policies.charter.making import Changes
from policies.charter.signing import add_signature
from policies.charter.timestamps import CLOCKS, LEAP, read_offered
from policies.charter.trust import metadata_bytes
from policies.errors import CharterRefused, ProposalRefused

NAMES = ("one", "two", "three")
DAY = timedelta(days=1)
REFUSING = b'package sealwright.release\n\nreasons := {"no"}\n'


@dataclass
class Folders:
    """The charter's folders of three brokers, without their processes."""

    world: Any
    at: datetime
    root: Path

    def __post_init__(self) -> None:
        self.by_name = {name: self.open(name, index) for index, name in enumerate(NAMES)}

    def open(self, name: str, index: int) -> CharterFolder:
        folder = self.root / name
        write_store(folder, self.world.store)
        found = CharterFolder(folder, self.world.root, lambda: [self.world.broker_key(index)], DAY)
        found.load(self.at)
        return found

    def exchange(self, name: str, present: tuple[str, ...]) -> bytes | None:
        """What stamping_round does, without a network; returns the timestamp that it completed."""
        asking = self.by_name[name]
        offer = asking.offer(self.at)
        replies = self.show(offer.timestamp, name, present)
        complete = asking.join([raw for raw in replies if raw is not None], self.at)
        if complete is not None:
            self.show(complete, name, present)
        return complete

    def show(self, stamp: bytes, name: str, present: tuple[str, ...]) -> list[bytes | None]:
        found = []
        for other in present:
            if other != name:
                with suppress(ProposalRefused):
                    found.append(self.by_name[other].reply(stamp, self.at).timestamp)
        return found

    def stamp(self, name: str) -> Any:
        store = read_store(self.root / name)
        return read_offered(store, store[TIMESTAMP], self.at)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any
) -> Any:
    folder = tmp_path_factory.mktemp("stamps")
    return tools.found_world(folder, virtual_vendor, virtual_chips, NAMES, broker_threshold=2)


@pytest.fixture
def folders(world: Any, tmp_path: Path, tools: Any) -> Folders:
    return Folders(world, tools.now(), tmp_path)


# --- the rules, without processes -------------------------------------------------------------------------------------


def test_an_ageing_timestamp_is_renewed_by_two_and_taken_by_the_third(folders: Folders) -> None:
    folders.at += DAY * 0.6
    first = folders.by_name["one"]
    assert first.load(folders.at) is None, "the old one holds for a while yet"
    assert first.lacking
    assert first.problem is None
    before = folders.stamp("three").version
    assert folders.exchange("one", NAMES) is not None
    for name in NAMES:
        stamp = folders.stamp(name)
        assert stamp.complete
        assert (stamp.version, stamp.expires) == (before + 1, folders.at + DAY)
        folders.by_name[name].load(folders.at)
        assert not folders.by_name[name].lacking
    assert folders.exchange("two", NAMES) is None, "what is fresh is left alone"


def test_signatures_that_come_one_after_another_are_kept(folders: Folders, world: Any) -> None:
    folders.at += DAY * 2
    for name in NAMES:
        assert folders.by_name[name].load(folders.at) is None
        assert "needs 2 signatures, has 1" in (folders.by_name[name].problem or "")
    assert folders.exchange("one", ("one",)) is None
    begun = folders.by_name["one"].offer(folders.at).timestamp
    assert folders.by_name["one"].offer(folders.at + timedelta(minutes=3)).timestamp == begun
    complete = folders.exchange("one", ("one", "three"))
    assert complete is not None
    for name in ("one", "three"):
        assert folders.by_name[name].load(folders.at) is not None
        assert folders.stamp(name).raw == complete
    with pytest.raises(ProposalRefused) as error:
        folders.stamp("two")
    assert any("expired" in reason for reason in error.value.reasons)


def test_one_broker_cannot_complete_it_alone_whatever_it_makes_up(folders: Folders, world: Any) -> None:
    folders.at += DAY * 0.6
    store = read_store(folders.root / "one")
    mine = sign_timestamp(store, world.broker_key(0), folders.at)[TIMESTAMP]
    assert folders.by_name["one"].join([mine, mine], folders.at) is None
    assert not read_offered(store, mine, folders.at).complete


def test_what_a_rogue_broker_offers_is_not_signed(folders: Folders, world: Any) -> None:
    asked, at = folders.by_name["two"], folders.at + DAY * 0.6
    store, key = read_store(folders.root / "one"), world.broker_key(0)

    def offer(**changes: Any) -> bytes:
        lifetime = changes.get("lifetime", DAY)
        return sign_timestamp(changes.get("store", store), changes.get("key", key), at, lifetime)[TIMESTAMP]

    def refused(raw: bytes) -> str:
        with pytest.raises(ProposalRefused) as error:
            asked.reply(raw, at)
        return "; ".join(error.value.reasons)

    assert "longer than this broker vouches" in refused(offer(lifetime=DAY + CLOCKS + timedelta(seconds=1)))
    far = dict(store)
    for _ in range(LEAP + 1):
        far = sign_timestamp(sign_timestamp(far, key, at), key, at)  # its own signature twice completes none: the next
    assert "does not come after" in refused(far[TIMESTAMP])
    assert "not readable" in refused(b"{}")
    assert "larger than" in refused(b" " * 20000)
    good = offer()
    stranger = folders.world.member_keys["acme-pharma"]
    with pytest.raises(ProposalRefused, match="no broker's"):
        sign_timestamp(store, stranger, at)
    assert read_offered(store, asked.reply(good, at).timestamp or b"", at).complete


def test_a_signature_by_nobody_of_the_charter_is_named(folders: Folders, world: Any) -> None:
    at = folders.at + DAY * 0.6
    store = read_store(folders.root / "one")
    good = sign_timestamp(store, world.broker_key(0), at)[TIMESTAMP]
    marks = good.index(b'"sig":"') + 7
    spoilt = good[:marks] + (b"1" if good[marks : marks + 1] == b"0" else b"0") + good[marks + 1 :]
    with pytest.raises(ProposalRefused) as error:
        folders.by_name["two"].reply(spoilt, at)
    assert any("the signature by broker one is not valid" in reason for reason in error.value.reasons)
    begin, end = good.index(b'"signatures":[') + 14, good.index(b'],"signed"')
    with pytest.raises(ProposalRefused) as error:
        folders.by_name["two"].reply(good[:begin] + good[end:], at)
    assert error.value.reasons == ("nobody has signed it",)


def test_a_newer_charter_is_taken_only_if_its_members_signed_it(folders: Folders, world: Any, tools: Any) -> None:
    old = dict(world.store)
    files = {"members/borealis-hospital/release/key.new.rego": b'package sealwright.release\n\nreasons := {"no"}\n'}
    try:
        world.change(Changes(put=files), to=())
        newer = dict(world.store)
    finally:
        world.store = old
    behind = folders.by_name["three"]
    version = load_charter(old, world.root, folders.at).version
    assert not behind.take(old, folders.at)
    for name in newer:
        if name.endswith("members/borealis-hospital.json") or name == f"metadata/{version + 1}.snapshot.json":
            spoilt = {**newer, name: newer[name].replace(b'"sig":"', b'"sig":"00', 1)}
            with pytest.raises(CharterRefused):
                behind.take(spoilt, folders.at)
    assert behind.take(newer, folders.at)
    assert read_store(folders.root / "three")[TIMESTAMP] == old[TIMESTAMP]
    assert behind.load(folders.at) is None
    assert behind.lacking
    assert folders.by_name["one"].reply(newer[TIMESTAMP], folders.at).version == version
    assert folders.by_name["one"].reply(newer[TIMESTAMP], folders.at).timestamp is None
    behind.reply(newer[TIMESTAMP], folders.at)
    found = behind.load(folders.at)
    assert found is not None
    assert found.charter.version == version + 1


def test_a_newer_charter_that_too_few_members_signed_is_not_put_in_the_folder(folders: Folders, world: Any) -> None:
    old = dict(world.store)
    version = load_charter(old, world.root, folders.at).version
    try:
        world.change(Changes(put={"members/cygnus-bio/release/key.new.rego": REFUSING}), to=())
        newer = dict(world.store)
    finally:
        world.store = old
    name = f"metadata/{version + 1}.snapshot.json"
    snapshot: Metadata[Snapshot] = Metadata.from_bytes(newer[name])
    while len(snapshot.signatures) > 1:
        snapshot.signatures.popitem()
    with pytest.raises(CharterRefused) as error:
        folders.by_name["three"].take({**newer, name: metadata_bytes(snapshot)}, folders.at)
    assert any("role snapshot needs 2 signatures, has 1" in reason for reason in error.value.reasons)
    assert read_store(folders.root / "three") == old


def test_a_timestamp_of_another_snapshot_with_the_same_number_is_not_signed(folders: Folders, world: Any) -> None:
    at = folders.at + DAY * 0.6
    store = read_store(folders.root / "one")
    stamp: Metadata[Timestamp] = Metadata.from_bytes(sign_timestamp(store, world.broker_key(0), at)[TIMESTAMP])
    stamp.signed.snapshot_meta = MetaFile.from_data(stamp.signed.snapshot_meta.version, b"another", ["sha256"])
    stamp.signatures.clear()
    add_signature(stamp, world.broker_key(0))
    with pytest.raises(ProposalRefused) as error:
        folders.by_name["two"].reply(metadata_bytes(stamp), at)
    assert any("names another snapshot" in reason for reason in error.value.reasons)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.sets(st.sampled_from(NAMES)),
            st.floats(min_value=0, max_value=0.9),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whoever_meets_whom_no_timestamp_steps_back_and_three_that_meet_have_one(
    world: Any, tmp_path: Path, tools: Any, steps: list[tuple[str, set[str], float]]
) -> None:
    folders = Folders(world, tools.now(), tmp_path / os.urandom(4).hex())
    last = dict.fromkeys(NAMES, 0)
    for asking, present, days in steps:
        folders.at += DAY * days
        for name in NAMES:
            folders.by_name[name].load(folders.at)
        folders.exchange(asking, tuple({*present, asking}))
        for name in NAMES:
            folders.by_name[name].load(folders.at)
            raw = read_store(folders.root / name)[TIMESTAMP]
            assert len(raw) < 2000
            version = folders.by_name[name]._known.versions["timestamp"]  # type: ignore[union-attr]
            assert version >= last[name]
            last[name] = version
    for name in NAMES:
        folders.exchange(name, NAMES)
        folders.by_name[name].load(folders.at)
    for name in NAMES:
        load_charter(read_store(folders.root / name), world.root, folders.at)
        assert folders.stamp(name).complete


# --- three processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def running(
    tmp_path: Path, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any
) -> Iterator[tuple[Any, dict[str, Any], Callable[[str], None]]]:
    world = tools.found_world(tmp_path, virtual_vendor, virtual_chips, NAMES, broker_threshold=2)
    found: dict[str, Any] = {}

    def start(name: str, *, wait: bool = True) -> None:
        entry = next(entry for entry in world.entries if entry.name == name)
        found[name] = tools.start_broker(world.folder / name, entry, wait=wait)

    try:
        yield world, found, start
    finally:
        for broker in found.values():
            if broker.process.poll() is None:
                broker.stop()


def followed(broker: Any) -> int:
    client = BrokerClient(broker.entry, "virtual.trial")
    try:
        return int(client.time().result["charter"]["version"])
    finally:
        client.close()


def eventually(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.2)


def test_a_charter_published_at_one_broker_without_a_timestamp_reaches_all(running: Any, tools: Any) -> None:
    world, brokers, start = running
    for entry in world.entries:  # nobody has put the time on: the brokers have to
        (world.folder / entry.name / "charter" / TIMESTAMP).unlink()
    for name in NAMES:
        start(name, wait=False)
    for name in NAMES:
        brokers[name].wait_for("ready", 60)
    assert {followed(broker) for broker in brokers.values()} == {2}
    brokers["three"].stop()
    files = {"members/borealis-hospital/release/key.data.rego": b'package sealwright.release\n\nreasons := {"no"}\n'}
    world.change(Changes(put=files), to=())
    del world.store[TIMESTAMP]
    world.publish(("one",))
    brokers["one"].process.send_signal(1)
    eventually(lambda: followed(brokers["one"]) == followed(brokers["two"]) == 3)
    start("three")
    eventually(lambda: followed(brokers["three"]) == 3)
    guest = world.guest()
    guest.attest()
    assert guest.brokers == NAMES
    assert guest.charter.version == 3
    guest.close()


def test_a_broker_alone_waits_and_says_for_whom(running: Any) -> None:
    world, brokers, start = running
    for entry in world.entries:
        (world.folder / entry.name / "charter" / TIMESTAMP).unlink()
    start("two", wait=False)
    waiting = brokers["two"].wait_for("waiting", 60)
    assert "needs 2 signatures, has 1 (by broker two)" in waiting["problem"]
    told = brokers["two"].wait_for("timestamp", 60)
    assert told["broker"] in ("one", "three")
    assert "cannot be reached" in told["problem"]
    with pytest.raises(Exception, match="no charter that holds"):
        followed(brokers["two"])
    brokers["two"].stop()
    assert brokers["two"].process.returncode == 0


def test_an_offer_over_http_is_bounded_and_its_refusal_signed(running: Any, tools: Any) -> None:
    world, _, start = running
    start("one")
    start("two")
    client = BrokerClient(world.entries[0], "virtual.trial")
    try:
        stamp = world.store[TIMESTAMP]
        answer = client.answer("POST", "/v1/timestamp", canonical_bytes({"timestamp": b64(stamp)}), nonce="")
        assert answer.result["version"] == 2
        assert unb64(answer.result["timestamp"], where="timestamp") == stamp
        with pytest.raises(BrokerRefused) as error:
            client.answer("POST", "/v1/timestamp", canonical_bytes({"timestamp": b64(b"{}")}), nonce="")
        assert "not readable" in str(error.value.reasons)
        for body in (b"{}", canonical_bytes({"timestamp": b64(stamp), "more": 1}), b"[" * 1000, b"x" * 100_000):
            with pytest.raises(Exception, match=r"cannot use|cannot be|HTTP"):
                client.answer("POST", "/v1/timestamp", body, nonce="")
    finally:
        client.close()
    folder = CharterFolder(world.folder / "one/charter", world.root, lambda: [world.broker_key(0)], DAY)
    folder.load(tools.now())
    assert set(stamping_round("one", folder, tools.now())) == {"three"}
