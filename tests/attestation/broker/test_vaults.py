"""Vaults at real brokers over TLS: made, opened, saved, taken over, rolled back, recovered; every attack is played."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from appliance.vault import Vault
from attestation.broker.storage import open_storage, read_database
from attestation.broker_session import BrokerSession
from attestation.client import GuestSession
from attestation.errors import BrokerRefused, BrokerUnavailable, StoreRefused, VaultFenced
from attestation.evidence.report import Product
from attestation.fresh_state import FILE, StoreFile
from attestation.guest_vault import GuestVault, open_vault
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.ledger.checkpoint import ledger_origin
from attestation.ledger.entry import Entry, parse_entry
from attestation.vaults import Mark
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter.making import Changes
from policies.charter.proposal import files_of
from policies.errors import Refused
from policies.keys import load_private_key
from policies.vaults import VaultRecovery

NAMES = ("one", "two", "three")
NORTH = "borealis-hospital/vault-site/north"
SOUTH = "cygnus-bio/vault-site/south"


@dataclass
class Disk:
    """The host's disk: the folder of a guest's volume, copies of it, and how often it was formatted."""

    folder: Path
    formatted: int = 0
    keys: list[bytes] = field(default_factory=list)

    def mount(self, key: bytes, fresh: bool) -> Path:
        """What a guest does with its volume; the host may have put any older one there."""
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.formatted += 1
        self.keys.append(key)
        return self.folder

    def copy(self, name: str) -> Path:
        """Keep the disk as it is now."""
        kept = self.folder.with_name(f"{self.folder.name}-{name}")
        shutil.copytree(self.folder, kept)
        return kept

    def put(self, kept: Path) -> None:
        """Put a copy in the disk's place."""
        shutil.rmtree(self.folder)
        shutil.copytree(kept, self.folder)


@dataclass
class Vaults:
    """A consortium with its brokers, and guests with their disks."""

    world: Any
    start: Callable[..., Any]
    folder: Path
    running: dict[str, Any] = field(default_factory=dict)
    sessions: list[GuestSession] = field(default_factory=list)
    since: dict[str, int] = field(default_factory=dict)
    number: int = 0

    def begin(self, folder: Path, rules: Mapping[str, bytes]) -> None:
        """All brokers are up, and the vault begins anew: by a recovery from nothing, as members would have it."""
        self.up(*(name for name in NAMES if name not in self.running))
        self.folder = folder
        self.recover(0, more=rules)
        for name in NAMES:
            self.since[name] = len(self.ledger(name))

    def end(self) -> None:
        for guest in self.sessions:
            guest.close()
        self.sessions.clear()

    def up(self, *names: str) -> None:
        for name in names:
            entry = next(entry for entry in self.world.entries if entry.name == name)
            self.running[name] = self.start(self.world.folder / name, entry)

    def down(self, *names: str) -> None:
        for name in names:
            self.running.pop(name).stop()

    def boot(self, role: str = "site", name: str = "north") -> GuestSession:
        """A guest that was launched anew (another REPORT_ID) and has attested."""
        guest: GuestSession = self.world.guest(role, name, timeout=5.0)
        self.sessions.append(guest)
        guest.attest()
        return guest

    def disk(self, name: str = "north") -> Disk:
        return Disk(self.folder / f"disk-{name}")

    def ledger(self, name: str) -> list[bytes]:
        database = self.world.folder / name / "state/broker.sqlite"
        found: list[bytes] = read_database(database, lambda step: step.entries(0, step.size()))
        return found

    def entries(self, name: str, kind: str) -> list[Mapping[str, Any]]:
        """What a broker wrote down of this kind since the test began."""
        read = map(parse_entry, self.ledger(name)[self.since[name] :])
        return [entry.body for entry in read if entry.kind == kind]

    def audits(self) -> dict[str, tuple[Any, ...]]:
        """What an audit of each broker's ledger has against it."""
        found = {}
        for entry in self.world.entries:
            folder = self.folder / f"audit-{entry.name}-{len(list(self.folder.iterdir()))}"
            database = self.world.folder / entry.name / "state/broker.sqlite"
            read_database(database, lambda step, folder=folder: export_bundle(step, folder))
            found[entry.name] = verify_audit(folder, self.world.root).problems
        return found

    def recover(self, generation: int, to: str = "north", more: Mapping[str, bytes] | None = None) -> None:
        self.number += 1
        document = VaultRecovery(
            role="site",
            name="north",
            member="borealis-hospital",
            number=self.number,
            generation=generation,
            to_role="site",
            to_name=to,
        )
        self.world.change(Changes(put={**files_of([document]), **(more or {})}))


@pytest.fixture(scope="module")
def consortium(
    tmp_path_factory: pytest.TempPathFactory,
    virtual_vendor: Vendor,
    virtual_chips: Mapping[Product, Chip],
    tools: Any,
) -> Iterator[Vaults]:
    """Three brokers of three members."""
    folder = tmp_path_factory.mktemp("vaults")
    made = Vaults(tools.found_world(folder, virtual_vendor, virtual_chips, NAMES), tools.start_broker, folder)
    try:
        yield made
    finally:
        made.down(*made.running)


@pytest.fixture
def three(consortium: Vaults, tmp_path: Path, tools: Any) -> Iterator[Vaults]:
    """The consortium with all brokers up, and no vault in use."""
    rules = {
        "members/borealis-hospital/release/vault-site.north.rego": tools.release_rules("site", "north"),
        "members/cygnus-bio/release/vault-site.south.rego": tools.release_rules("site", "south"),
    }
    consortium.begin(tmp_path, rules)
    yield consortium
    consortium.end()


def refused(work: Callable[[], Any]) -> str:
    """Every reason for which it is refused."""
    with pytest.raises(BrokerRefused) as caught:
        work()
    return "; ".join(caught.value.reasons)


def opened(vaults: Vaults, disk: Disk) -> GuestVault:
    return open_vault(vaults.boot(), disk.mount)


def test_a_vault_lives_through_boots(three: Vaults) -> None:
    disk = three.disk()
    first = opened(three, disk)
    assert (first.name, first.generation, dict(first.entries), disk.formatted) == (NORTH, 1, {}, 1)
    first.save({"rounds": b"1"})
    second = opened(three, disk)
    assert (second.generation, dict(second.entries), disk.formatted) == (2, {"rounds": b"1"}, 1)
    assert disk.keys == [first.key, first.key]
    assert first.key.hex() not in repr(first)
    second.save({"rounds": b"2"})
    second.check()
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_a_disk_of_before_is_refused_and_told(three: Vaults) -> None:
    disk = three.disk()
    first = opened(three, disk)
    first.save({"rounds": b"1"})
    old = disk.copy("old")
    first.save({"rounds": b"2"})
    new = disk.copy("new")
    disk.put(old)
    with pytest.raises(StoreRefused, match="has generation 2, and 3 was committed: the disk was rolled back"):
        opened(three, disk)
    (disk.folder / FILE).unlink()
    with pytest.raises(StoreRefused, match="its store is missing, and generation 3 was committed"):
        opened(three, disk)
    disk.put(new)
    assert opened(three, disk).entries == {"rounds": b"2"}
    told = [body["document"]["reasons"] for name in NAMES for body in three.entries(name, "vault-refused")]
    assert len(told) == 2
    assert disk.formatted == 1
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_a_data_volume_is_never_older_than_the_vault_has_seen_it(three: Vaults) -> None:
    disk, scans = three.disk(), "ab" * 16
    first = opened(three, disk)
    first.save({"rounds": b"1"})
    Vault(disk.folder, first).never_older(scans, 7)
    vault = Vault(disk.folder, opened(three, disk))
    with pytest.raises(Refused, match="data volume was rolled back: to generation 6, after 7"):
        vault.never_older(scans, 6)
    vault.never_older(scans, 7)
    vault.never_older("cd" * 16, 1)
    vault.never_older(scans, 8)
    with pytest.raises(Refused, match="to generation 7, after 8"):
        vault.never_older(scans, 7)
    assert vault.state.entries["rounds"] == b"1"


def test_of_two_live_clones_one_stops(three: Vaults) -> None:
    disk = three.disk()
    first = opened(three, disk)
    first.check()
    cloned = Disk(disk.copy("clone"))
    second = open_vault(three.boot(), cloned.mount)
    with pytest.raises(VaultFenced, match="a newer boot of this guest holds the vault"):
        first.check()
    before = (disk.folder / FILE).read_bytes()
    with pytest.raises(VaultFenced, match="this one stops"):
        first.save({"rounds": b"the first one's"})
    assert (disk.folder / FILE).read_bytes() == before
    second.check()
    second.save({"rounds": b"the second one's"})
    with pytest.raises(VaultFenced):  # a boot that was overtaken does not come back
        open_vault(first._session, disk.mount)
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_two_clones_that_start_at_once(three: Vaults) -> None:
    """At most one of them goes on, whatever the order in which brokers hear of them; and the vault with it."""
    disk = three.disk()
    opened(three, disk)
    for number in range(3):
        pair = [(three.boot(), Disk(disk.copy(f"{number}-{name}"))) for name in ("left", "right")]
        vaults: list[GuestVault] = []

        def start(session: GuestSession, own: Disk, number: int = number, vaults: list[GuestVault] = vaults) -> None:
            with suppress(VaultFenced, StoreRefused, BrokerUnavailable):
                vault = open_vault(session, own.mount)
                vault.save({"n": str(number).encode()})
                vaults.append(vault)

        threads = [threading.Thread(target=start, args=one) for one in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        going_on = []
        for vault in vaults:
            with suppress(VaultFenced, BrokerUnavailable):
                vault.save({"n": b"more"})
                going_on.append(vault)
        assert len(going_on) <= 1
        tried = []
        for _, own in pair:
            with suppress(StoreRefused):
                tried.append((opened(three, own), own))
        assert tried, "one of the disks is the newest"
        disk = tried[-1][1]


def test_it_goes_on_without_one_broker_which_catches_up(three: Vaults) -> None:
    disk = three.disk()
    first = opened(three, disk)
    three.down("three")
    first.save({"rounds": b"1"})
    old = disk.copy("old")
    second = opened(three, disk)
    second.save({"rounds": b"2"})
    three.up("three")
    three.down("one")
    disk.put(old)
    with pytest.raises(StoreRefused, match="rolled back"):  # three knows of nothing since; two does
        opened(three, disk)
    three.down("two")
    with pytest.raises((BrokerUnavailable, BrokerRefused)):
        opened(three, disk)
    three.up("one", "two")
    disk.put(old)
    with pytest.raises(StoreRefused, match="rolled back"):
        opened(three, disk)


def test_a_stale_broker_is_brought_up_to_date(three: Vaults) -> None:
    disk = three.disk()
    opened(three, disk).save({"rounds": b"1"})
    three.down("three")
    opened(three, disk).save({"rounds": b"2"})
    three.up("three")
    third = opened(three, disk)
    third.save({"rounds": b"3"})
    states = [three.entries(name, "vault")[-1]["state"]["committed"] for name in NAMES]
    assert [state["generation"] for state in states] == [4, 4, 4]
    three.down("one")
    assert opened(three, disk).entries == {"rounds": b"3"}, "two and the one that was away are enough"
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_no_broker_has_the_key(three: Vaults) -> None:
    vault = opened(three, three.disk())
    for name in NAMES:
        (deposit,) = [body for body in three.entries(name, "vault") if body["step"] == "deposit"]
        assert (deposit["asked"]["k"], deposit["asked"]["brokers"]) == (2, sorted(NAMES))
        raw = (three.world.folder / name / "state/broker.sqlite").read_bytes()
        assert vault.key not in raw
        assert vault._keys.seal not in raw
    three.down("one", "two")
    with pytest.raises((BrokerUnavailable, BrokerRefused)):
        opened(three, three.disk())


def test_anothers_vault(three: Vaults) -> None:
    """Of another name, of another role, by another way: refused and logged."""
    opened(three, three.disk())
    south = three.boot("site", "south")
    for asked, why in ((NORTH, "is not the vault of site south"), (SOUTH, "no key of the vault")):
        answers, failures = south.ask_each(NAMES, lambda one, asked=asked: one.open_vault(asked, 9))
        assert answers == {}
        assert all(why in "; ".join(error.reasons) for error in failures.values()), failures
    hub = three.boot("server", "hub")
    mark = Mark(generation=7, root="0" * 128)
    for call in (
        lambda one: one.open_vault(NORTH, 9),
        lambda one: one.mark("prepare", NORTH, mark),
        lambda one: one.mark("commit", NORTH, mark),
    ):
        answers, failures = hub.ask_each(NAMES, call)
        assert answers == {}
        assert all("is not the vault of server hub" in "; ".join(error.reasons) for error in failures.values())
    north = three.boot()
    with pytest.raises(BrokerRefused, match="its guest opens the vault"):
        north.release_from("one", NORTH)
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_a_policy_that_says_no_opens_nothing(three: Vaults, tools: Any) -> None:
    disk = three.disk()
    opened(three, disk)
    rules = tools.release_rules("site", "someone-else")
    three.world.change(Changes(put={"members/borealis-hospital/release/vault-site.north.rego": rules}))
    assert "is not one of those named" in refused(lambda: opened(three, disk))
    three.world.change(Changes(remove=frozenset({"members/borealis-hospital/release/vault-site.north.rego"})))
    assert "no release policy" in refused(lambda: opened(three, disk))
    assert disk.formatted == 1
    hub = three.boot("server", "hub")
    assert "it could never be opened" in refused(lambda: open_vault(hub, three.disk("hub").mount))
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_an_owner_deposits_no_vaults_key(three: Vaults) -> None:
    from attestation.client import BrokerClient

    client = BrokerClient(three.world.entries[0], "virtual.trial")
    key = three.world.member_keys["borealis-hospital"]
    with pytest.raises(BrokerRefused, match="which its guest makes and deposits"):
        client.deposit(NORTH, b"k" * 32, key, charter_id=three.world.charter().id)
    client.close()


def test_the_members_recover_a_vault(three: Vaults) -> None:
    disk = three.disk()
    vault = opened(three, disk)
    vault.save({"rounds": b"1"})
    copy = disk.copy("backup")
    vault.save({"rounds": b"2"})
    newest = disk.copy("newest")
    three.recover(2)
    with pytest.raises(StoreRefused, match="has generation 3, which was not prepared"):  # it was given up
        opened(three, disk)
    disk.put(copy)
    again = opened(three, disk)
    assert (again.generation, again.entries) == (2, {"rounds": b"1"})
    again.save({"rounds": b"another second"})
    after = disk.copy("after")
    assert again.generation == 4, "that of what was given up is not used again"
    disk.put(newest)
    with pytest.raises(StoreRefused, match="rolled back"):
        opened(three, disk)
    disk.put(copy)
    with pytest.raises(StoreRefused, match="rolled back"):  # each recovery counts once
        opened(three, disk)
    disk.put(after)
    assert opened(three, disk).entries == {"rounds": b"another second"}
    three.recover(0)
    anew = opened(three, disk)
    assert (anew.entries, disk.formatted) == ({}, 2)
    assert anew.key != again.key
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_a_recovery_gives_a_vault_to_another_guest(three: Vaults, tools: Any) -> None:
    disk = three.disk()
    opened(three, disk).save({"rounds": b"1"})
    rules = tools.release_rules("site", "south")
    three.world.change(Changes(put={"members/borealis-hospital/release/vault-site.north.rego": rules}))
    south = three.boot("site", "south")
    assert "is not the vault of site south" in refused(lambda: open_vault(south, disk.mount, vault=NORTH))
    three.recover(2, to="south")
    moved = open_vault(three.boot("site", "south"), disk.mount)
    assert (moved.name, moved.entries) == (NORTH, {"rounds": b"1"})
    north = three.boot()
    assert "is not the vault of site north" in refused(lambda: open_vault(north, disk.mount, vault=NORTH))
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_a_broker_whose_database_was_put_back(three: Vaults) -> None:
    """What one broker forgets, the others know: the older disk stays refused, and the vault goes on."""
    disk = three.disk()
    vault = opened(three, disk)
    vault.save({"rounds": b"1"})
    old = disk.copy("old")
    three.down("three")
    state = three.world.folder / "three/state"
    shutil.copytree(state, three.folder / "state-before")
    three.up("three")
    vault = opened(three, disk)
    vault.save({"rounds": b"2"})
    assert three.entries("three", "vault")[-1]["state"]["committed"]["generation"] == 3
    newest = disk.copy("newest")
    three.down("three")
    shutil.rmtree(state)
    shutil.copytree(three.folder / "state-before", state)
    three.up("three")
    disk.put(old)
    with pytest.raises(StoreRefused, match="has generation 2, and 3 was committed"):
        opened(three, disk)
    disk.put(newest)
    again = opened(three, disk)
    assert (again.generation, again.entries) == (3, {"rounds": b"2"})
    assert three.entries("three", "vault")[-1]["state"]["committed"]["generation"] == 3, "and it has caught up"
    again.save({"rounds": b"3"})


KILLED_AT = [
    *(
        (f"{when} {step} {number}")
        for step in ("prepare", "commit")
        for number in (1, 3)
        for when in ("before", "after")
    ),
    "before the write",
    "before the rename",
    "after the rename",
]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_guest_killed_between_the_phases(three: Vaults) -> None:
    """`kill -9` at every step of a save: the next boot finds the store of before or the new one, and goes on."""
    disk = three.disk()
    opened(three, disk).save({"n": b"0"})
    last = 0
    for number, point in enumerate(KILLED_AT, 1):
        child = get_context("fork").Process(target=save_and_die, args=(three, disk, number, point))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == -signal.SIGKILL, point
        vault = opened(three, disk)
        found = int(vault.entries["n"])
        assert found in (last, number), point
        if "commit" in point or point == "after the rename":
            assert found == number, point
        if "prepare" in point or point.startswith("before the"):
            assert found == last, point
        last = found
    assert disk.formatted == 1
    assert three.audits() == dict.fromkeys(NAMES, ())


def save_and_die(vaults: Vaults, disk: Disk, number: int, point: str) -> None:
    """In a process of its own: open the vault, save `number`, and be killed at this point of it."""
    vault = open_vault(vaults.boot(), disk.mount)
    when, what, *nth = point.split()
    calls: dict[str, int] = {"prepare": 0, "commit": 0}
    lock = threading.Lock()
    marked, replaced = BrokerSession.mark, Path.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def mark(self: BrokerSession, step: Any, name: str, value: Mark) -> Any:
        with lock:
            calls[step] += 1
            due = step == what and calls[step] == int(nth[0])
            if due and when == "before":
                die()
            answer = marked(self, step, name, value)
            if due:
                die()
            return answer

    def replace(self: Path, target: Path) -> Path:
        if point == "before the rename":
            die()
        found = replaced(self, target)
        if point == "after the rename":
            die()
        return found

    def write(self: StoreFile, store: Any) -> None:
        die()

    BrokerSession.mark = mark  # type: ignore[method-assign]
    Path.replace = replace  # type: ignore[method-assign,assignment]
    if point == "before the write":
        StoreFile.write = write  # type: ignore[method-assign]
    vault.save({"n": str(number).encode()})


def test_brokers_killed_between_the_phases(three: Vaults, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill -9` of every broker after the store was prepared: the store that is on the disk is the one that counts."""
    disk = three.disk()
    vault = opened(three, disk)
    vault.save({"n": b"1"})
    old = disk.copy("old")
    settle = GuestVault._settle

    def kill_first(self: GuestVault, prepared: Any = ()) -> None:
        if prepared:
            for name in NAMES:
                three.running.pop(name).stop(signal.SIGKILL)
        settle(self, prepared)

    monkeypatch.setattr(GuestVault, "_settle", kill_first)
    with pytest.raises(BrokerUnavailable, match="committed the store"):
        vault.save({"n": b"2"})
    monkeypatch.undo()
    three.up(*NAMES)
    again = opened(three, disk)
    assert again.entries == {"n": b"2"}
    disk.put(old)
    with pytest.raises(StoreRefused, match="rolled back"):
        opened(three, disk)
    assert three.audits() == dict.fromkeys(NAMES, ())


def test_an_auditor_sees_a_state_that_does_not_follow(three: Vaults, tmp_path: Path) -> None:
    """What an operator with the broker's own keys can do: write a state that is older, or give a key without cause."""
    vault = opened(three, three.disk())
    vault.save({"n": b"1"})
    vault.save({"n": b"2"})
    three.down("three")
    copied = tmp_path / "three"
    shutil.copytree(three.world.folder / "three", copied)
    three.up("three")
    bodies = {kind: dict(three.entries("three", kind)[-1]) for kind in ("vault", "release")}
    older = next(body["state"] for body in three.entries("three", "vault") if body["step"] == "commit")
    at = parse_entry(three.ledger("three")[-1]).time
    forged = (
        (
            "vault",
            {"state": {**bodies["vault"]["state"], "committed": older["committed"]}},
            "is not the one that follows",
        ),
        ("vault", {"asked": older["committed"], "state": older}, "was not prepared with this root"),
        ("release", {"epoch": 1}, "should not have been released: a newer boot"),
    )
    for number, (kind, changes, why) in enumerate(forged):
        folder = tmp_path / f"forged-{number}"
        shutil.copytree(copied, folder)
        storage = open_storage(
            f"sqlite:///{folder / 'state/broker.sqlite'}",
            ledger_origin("virtual.trial", "three"),
            load_private_key(folder / "keys/signing.pem"),
        )
        body = {**bodies[kind], **changes}
        storage.transact_now(lambda step, kind=kind, body=body: step.append(Entry(kind, at, body), resource=NORTH))
        storage.close()
        bundle = tmp_path / f"bundle-{number}"
        read_database(folder / "state/broker.sqlite", lambda step, bundle=bundle: export_bundle(step, bundle))
        problems = [problem.reason for problem in verify_audit(bundle, three.world.root).problems]
        assert any(why in reason for reason in problems), (kind, why, problems)
