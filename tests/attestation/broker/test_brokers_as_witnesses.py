"""Three brokers that are each other's witnesses: they start in any order, and none witnesses its own ledger."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from witness_world import REPOSITORY, demand

from attestation.connection import Connection
from attestation.errors import BrokerUnavailable
from attestation.evidence.report import Product
from attestation.ledger.checkpoint import parse_note
from attestation.ledger.cosignature import cosigners, ledger_of
from attestation.ledger.witness import AddCheckpoint, known_logs
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from attestation.witness.config import read_witness_entry
from policies.documents import BrokerEntry

NAMES = ("one", "two", "three")
SITE_KEY = "borealis-hospital/key/data"


def seal(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "appliance.cli", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=60)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any
) -> Any:
    """Three members with a broker each; each broker is a witness too, and both others must cosign a ledger."""
    folder = tmp_path_factory.mktemp("mutual")
    found = tools.found_world(folder, virtual_vendor, virtual_chips, NAMES, lease_seconds=900)
    entries = []
    for name in NAMES:
        made = seal("audit", "init-witness", "--broker", str(folder / name), "--json")
        assert made.returncode == 0, made.stderr
        entries.append(read_witness_entry(folder / name / "witness.json"))
        assert json.loads(made.stdout)["entry"]["public_key"] == entries[-1].public_key
    again = seal("audit", "init-witness", "--broker", str(folder / "one"))
    assert again.returncode == 2
    demand(found, 2, entries)
    return found


@pytest.fixture(scope="module")
def running(world: Any, tools: Any) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    try:
        for entry in reversed(world.entries):
            found[entry.name] = tools.start_broker(world.folder / entry.name, entry)
        for entry in world.entries:
            ready(entry)
        tools.deposit_all(world, world.entries[1])
        yield found
    finally:
        for broker in found.values():
            if broker.process.poll() is None:
                broker.stop()


def ask(entry: BrokerEntry, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = Connection(entry.name, entry.url, entry.issuer_certificate)
    try:
        return connection.call(method, path, body)
    finally:
        connection.close()


def ready(entry: BrokerEntry) -> None:
    """Wait until a broker is ready."""
    end = time.monotonic() + 60
    while (state := ask(entry, "GET", "/healthz"))[0] != 200:
        assert time.monotonic() < end, state
        time.sleep(0.1)


def test_each_has_both_others_cosign(world: Any, running: dict[str, Any]) -> None:
    guest = world.guest(timeout=20.0)
    try:
        guest.attest()
        assert sorted(guest.brokers) == sorted(NAMES)
        assert guest.release(SITE_KEY) == b"north's data key"
    finally:
        guest.close()
    consortium = world.charter().consortium
    for entry in world.entries:
        note = parse_note(ask(entry, "GET", "/v1/ledger/checkpoint")[1].decode())
        names = {name.rpartition("/")[2] for name in cosigners(note, ledger_of(consortium, entry).witnesses)}
        assert names == set(NAMES) - {entry.name}


def test_no_broker_witnesses_a_ledger_of_its_own_member(world: Any, running: dict[str, Any]) -> None:
    consortium = world.charter().consortium
    for entry in world.entries:
        note = ask(entry, "GET", "/v1/ledger/checkpoint")[1].decode()
        body = AddCheckpoint(0, (), note).to_bytes()
        assert ask(entry, "POST", "/v1/witness/add-checkpoint", body)[0] == 404
        own = known_logs(consortium, next(w.public_key for w in consortium.witnesses if w.name == entry.name))
        assert own is not None
        assert not any(f"/broker/{entry.name}/" in origin for origin in own.keys)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"old 0\n\nnothing", 400), (b"x" * 20_000, 413), (b"old 0\n" + b"\xff" * 100, 400)],
)
def test_a_witness_reads_strictly(world: Any, running: dict[str, Any], body: bytes, status: int) -> None:
    assert ask(world.entries[0], "POST", "/v1/witness/add-checkpoint", body)[0] == status


def test_with_both_others_down_a_broker_is_alive_and_gives_nothing(
    world: Any, running: dict[str, Any], tools: Any
) -> None:
    for name in ("one", "three"):
        running[name].stop()
    guest = world.guest(timeout=20.0)
    try:
        with pytest.raises(BrokerUnavailable, match="witness one cannot be reached"):
            guest.attest()
        state = json.loads(ask(world.entries[1], "GET", "/healthz")[1])
        assert (state["alive"], state["ready"]) == (True, False)
        for index in (2, 0):
            name = NAMES[index]
            running[name] = tools.start_broker(world.folder / name, world.entries[index])
        for entry in world.entries:
            ready(entry)
        guest.attest()
    finally:
        guest.close()


def test_a_witness_whose_state_is_gone_is_not_started(world: Any, running: dict[str, Any], tools: Any) -> None:
    folder: Path = world.folder / "three"
    running["three"].stop()
    state = folder / "state/witness.sqlite"
    kept = state.read_bytes()
    state.unlink()
    process = subprocess.run(
        [sys.executable, "-m", "attestation.broker", str(folder / "broker.toml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert process.returncode == 2
    assert "the state of this witness is gone" in process.stderr
    state.write_bytes(kept)
    running["three"] = tools.start_broker(folder, world.entries[2])
