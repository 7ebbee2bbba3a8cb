"""Vaults at real brokers over TLS: made, opened, saved, taken over, rolled back, recovered; every attack is played."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from attestation.broker.storage import read_database
from attestation.client import GuestSession
from attestation.errors import BrokerRefused, BrokerUnavailable, StoreRefused, VaultFenced
from attestation.evidence.report import Product
from attestation.fresh_state import FILE
from attestation.guest_vault import GuestVault, open_vault
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.ledger.entry import parse_entry
from attestation.vaults import Mark
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter.making import Changes
from policies.charter.proposal import files_of
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

    def entries(self, name: str, kind: str) -> list[Mapping[str, Any]]:
        database = self.world.folder / name / "state/broker.sqlite"
        raw = read_database(database, lambda step: step.entries(0, step.size()))
        return [entry.body for entry in map(parse_entry, raw) if entry.kind == kind]

    def audits(self) -> dict[str, tuple[Any, ...]]:
        """What an audit of each broker's ledger has against it."""
        found = {}
        for entry in self.world.entries:
            folder = self.folder / f"audit-{entry.name}-{len(list(self.folder.iterdir()))}"
            database = self.world.folder / entry.name / "state/broker.sqlite"
            read_database(database, lambda step, folder=folder: export_bundle(step, folder))
            found[entry.name] = verify_audit(folder, self.world.root).problems
        return found

    def recover(self, number: int, generation: int, to: str = "north") -> None:
        document = VaultRecovery(
            role="site",
            name="north",
            member="borealis-hospital",
            number=number,
            generation=generation,
            to_role="site",
            to_name=to,
        )
        self.world.change(Changes(put=files_of([document])))


def vaults_of(world: Any, tools: Any, folder: Path) -> Vaults:
    world.change(
        Changes(
            put={
                "members/borealis-hospital/release/vault-site.north.rego": tools.release_rules("site", "north"),
                "members/cygnus-bio/release/vault-site.south.rego": tools.release_rules("site", "south"),
            }
        )
    )
    return Vaults(world, tools.start_broker, folder)


@pytest.fixture
def three(
    tmp_path: Path, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any
) -> Iterator[Vaults]:
    """Three brokers of three members, running."""
    made = vaults_of(tools.found_world(tmp_path, virtual_vendor, virtual_chips, NAMES), tools, tmp_path)
    try:
        made.up(*NAMES)
        yield made
    finally:
        for guest in made.sessions:
            guest.close()
        made.down(*made.running)


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
