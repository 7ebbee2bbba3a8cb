"""Several processes of one broker on one PostgreSQL database: one ledger, exact limits, sessions anywhere."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from postgres_server import PASSWORD

from attestation.broker.storage import open_storage, read_database
from attestation.broker.upkeep import back_up, open_folder, restore
from attestation.canonical import b64, unb64
from attestation.client import BrokerClient
from attestation.errors import BrokerRefused, BrokerUnavailable, LedgerRefused
from attestation.hybrid import seal
from attestation.ledger.audit import AuditReport, verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.ledger.entry import Entry
from attestation.vault_messages import deposit_info
from policies.charter.making import Changes
from policies.errors import Refused, SealwrightError, Unusable
from policies.keys import write_secret

if TYPE_CHECKING:
    from postgres_server import PostgresServer

FIFTY = "borealis-hospital/key/fifty"
SITE_KEY = "borealis-hospital/key/data"
KEY = Ed25519PrivateKey.generate()
ORIGIN = "virtual.trial/broker/one/ledger"


@dataclass
class Pair:
    """One broker as two processes."""

    world: Any
    tools: Any
    folders: tuple[Path, Path]
    running: list[Any]

    def start(self, index: int) -> Any:
        folder = self.folders[index]
        listen = (folder / "broker.toml").read_text().split('listen = "')[1].split('"')[0]
        entry = self.world.entries[0].model_copy(update={"url": f"https://{listen}"})
        return self.tools.start_broker(folder, entry)

    def guest(self, index: int = 0) -> Any:
        """A site's guest, not attested yet, that calls one of the two."""
        attester = self.world.attester("site", "north")
        return self.tools.RawGuest(
            self.world, self.running[index].entry, attester, self.world.init_data["site/north"]
        ).open()

    def release(self, guest: Any, index: int, resource: str) -> None:
        """Have the guest take a resource from a process, whichever it attested to."""
        entry = self.running[index].entry
        guest.client.close()
        guest.client = BrokerClient(entry, "virtual.trial")
        guest.post("/v1/release", json.dumps({"job": None, "resource": resource}).encode())

    def audit(self, folder: Path) -> AuditReport:
        with open_folder(self.folders[0]) as (_, database):
            read_database(database, lambda step: export_bundle(step, folder))
        return verify_audit(folder, self.world.root)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
    virtual_vendor: Any,
    virtual_chips: Any,
    tools: Any,
    postgres: PostgresServer,
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    rules = tools.release_rules("site", "north", most=50)
    more = {"members/borealis-hospital/release/key.fifty.rego": rules}
    world = tools.found_world(folder, virtual_vendor, virtual_chips, ("one",), more=more)
    first, second = folder / "one", folder / "second"
    write_secret(first / "keys/database", PASSWORD.encode() + b"\n")
    with (first / "broker.toml").open("a") as settings:
        settings.write(f'database = "{postgres.create("pair")}"\ndatabase_password = "keys/database"\n')
    shutil.copytree(first, second)
    text = (second / "broker.toml").read_text()
    listen = text.split('listen = "')[1].split('"')[0]
    (second / "broker.toml").write_text(text.replace(listen, f"127.0.0.1:{tools.free_port()}"))
    made = Pair(world, tools, (first, second), [])
    made.running += [made.start(0), made.start(1)]
    try:
        tools.deposit_all(world, made.running[0].entry)
        client = BrokerClient(made.running[1].entry, "virtual.trial")
        client.deposit(FIFTY, b"fifty times", world.member_keys["borealis-hospital"], charter_id=world.charter().id)
        client.close()
        yield made
    finally:
        for broker in made.running:
            if broker.process.poll() is None:
                broker.stop()


def test_a_session_of_one_process_serves_at_the_other(pair: Pair) -> None:
    guest = pair.guest(0)
    guest.client.close()
    guest.client = BrokerClient(pair.running[1].entry, "virtual.trial")
    guest.attest()
    pair.release(guest, 0, SITE_KEY)
    body = json.dumps({"job": None, "resource": SITE_KEY}).encode()
    proof = guest.proof("POST", "/v1/release", body)
    guest.post("/v1/release", body, proof=proof)
    guest.client.close()
    guest.client = BrokerClient(pair.running[1].entry, "virtual.trial")
    with pytest.raises(BrokerRefused, match="was used before"):
        guest.post("/v1/release", body, proof=proof)
    guest.client.close()


def test_a_vault_is_one_at_two_processes(pair: Pair, tmp_path: Path) -> None:
    """What is sealed to one process opens at the other, and a boot that was fenced at one is fenced at both."""
    vault = "borealis-hospital/vault-site/north"
    rules = pair.tools.release_rules("site", "north")
    pair.world.change(Changes(put={"members/borealis-hospital/release/vault-site.north.rego": rules}))
    shutil.rmtree(pair.folders[1] / "charter")
    shutil.copytree(pair.folders[0] / "charter", pair.folders[1] / "charter")

    def ask(guest: Any, index: int, step: str, **asked: Any) -> Any:
        guest.client.close()
        guest.client = BrokerClient(pair.running[index].entry, "virtual.trial")
        return guest.post(f"/v1/vaults/{step}", json.dumps({"vault": vault, **asked}).encode())

    first, second = pair.guest(0), pair.guest(0)
    first.attest()
    second.attest()
    kem = unb64(ask(first, 0, "look")["kem"], where="kem")
    sealed = b64(seal(bytes(32), kem, info=deposit_info("one", vault, 1)))
    deal = {"number": 1, "k": 1, "brokers": ["one"], "commitments": {}}
    ask(first, 1, "deposit", epoch=1, deal=deal, sealed=sealed)
    ask(first, 0, "open", epoch=1)
    mark = {"generation": 1, "root": "ab" * 64}
    ask(first, 1, "prepare", mark=mark)
    assert ask(first, 0, "commit", mark=mark)["state"]["committed"] == mark
    assert ask(second, 1, "open", epoch=2)["state"]["committed"] == mark
    with pytest.raises(BrokerRefused, match="a newer boot of this guest holds the vault"):
        ask(first, 0, "prepare", mark={**mark, "generation": 2})
    for guest in (first, second):
        guest.client.close()
    assert pair.audit(tmp_path / "bundle").problems == ()


def test_a_limit_of_fifty_is_fifty_for_two_hundred_at_two_processes(pair: Pair, tmp_path: Path) -> None:
    def ask(number: int) -> list[str]:
        guest = pair.guest(number % 2)
        guest.attest()
        found = []
        for turn in range(5):
            try:
                pair.release(guest, (number + turn) % 2, FIFTY)
            except BrokerRefused as refused:
                found.append("refused" if "often" in str(refused.reasons) else str(refused.reasons))
            except SealwrightError as error:
                found.append(error.what)
            else:
                found.append("released")
        guest.client.close()
        return found

    with ThreadPoolExecutor(40) as pool:
        outcomes = Counter(outcome for found in pool.map(ask, range(40)) for outcome in found)
    assert outcomes == {"released": 50, "refused": 150}
    with open_folder(pair.folders[1]) as (_, database):
        logged = read_database(database, lambda step: step.count("release", resource=FIFTY))
    assert logged == 50
    report = pair.audit(tmp_path / "audit")
    assert (report.problems, report.kinds["release"] >= 50) == ((), True)


def test_a_newer_charter_of_one_process_is_followed_by_the_other(pair: Pair) -> None:
    before = pair.world.charter().version
    rules = pair.tools.release_rules("site", "north", most=900)
    pair.world.change(Changes(put={"members/borealis-hospital/release/key.open.rego": rules}))  # to the first's folder
    pair.running[0].process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with open_folder(pair.folders[0]) as (_, database):
            followed = read_database(database, lambda step: step.followed()) or ""
        if followed.endswith(f" {before + 1}"):
            break
        time.sleep(0.1)
    pair.running[1].process.send_signal(signal.SIGHUP)  # else it notices within half a minute, or at its next decision
    while time.monotonic() < end:
        client = BrokerClient(pair.running[1].entry, "virtual.trial")
        charter = json.loads(client._connection.call("GET", "/v1/charter")[1])["files"]
        client.close()
        if f"metadata/{before + 1}.snapshot.json" in charter:
            break
        time.sleep(0.1)
    guest = pair.guest(1)
    guest.attest()
    pair.release(guest, 0, SITE_KEY)
    guest.client.close()


def test_a_killed_process_leaves_the_other_serving_and_comes_back(pair: Pair, tmp_path: Path) -> None:
    ended = threading.Event()
    released: list[int] = []

    def hammer() -> None:
        guest = pair.guest(1)
        guest.attest()
        while not ended.is_set():
            try:
                guest.post("/v1/release", json.dumps({"job": None, "resource": SITE_KEY}).encode())
                released.append(1)
            except BrokerUnavailable:
                guest.client.close()
                guest.client = BrokerClient(pair.running[1].entry, "virtual.trial")
        guest.client.close()

    def hammer_the_first() -> None:
        guest = pair.guest(0)
        guest.attest()
        try:
            while not ended.is_set():
                guest.post("/v1/release", json.dumps({"job": None, "resource": SITE_KEY}).encode())
        except Refused:
            pass  # it was killed
        guest.client.close()

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    threads += [threading.Thread(target=hammer_the_first) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    pair.running[0].stop(signal.SIGKILL)
    at_death, end = len(released), time.monotonic() + 30
    while len(released) < at_death + 5 and time.monotonic() < end:
        time.sleep(0.05)
    served = len(released) - at_death
    ended.set()
    for thread in threads:
        thread.join(timeout=30)
    assert served >= 5
    pair.running[0] = pair.start(0)
    guest = pair.guest(0)
    guest.attest()
    pair.release(guest, 0, SITE_KEY)
    guest.client.close()
    assert pair.audit(tmp_path / "audit").problems == ()


def test_the_password_is_told_nowhere(pair: Pair) -> None:
    for broker in pair.running:
        assert PASSWORD not in json.dumps(broker.lines)
        assert PASSWORD not in Path(f"/proc/{broker.process.pid}/cmdline").read_text()
        client = BrokerClient(broker.entry, "virtual.trial")
        for path in ("/metrics", "/healthz"):
            assert PASSWORD.encode() not in client._connection.call("GET", path)[1]
        client.close()


def test_a_url_with_a_password_or_to_a_stranger_is_refused(postgres: PostgresServer) -> None:
    url = postgres.url("nothing")
    for wrong, why in (
        (url.replace("seal@", f"seal:{PASSWORD}@"), "a password in it"),
        (f"{url}?password=secret", "a password in it"),
        (f"{url}?options=-csearch_path%3Dx", "sets `options`"),
        ("postgresql+psycopg://seal@db.example/seal", "must prove who it is"),
        ("postgresql+psycopg://seal@db.example/seal?sslmode=require", "must prove who it is"),
        ("postgresql+psycopg://seal@/seal?host=db.example", "must prove who it is"),
        ("postgresql+asyncpg://seal@localhost/seal", "not used here"),
    ):
        with pytest.raises(Unusable, match=why) as refused:
            open_storage(wrong, ORIGIN, KEY)
        assert PASSWORD not in str(refused.value)
    with pytest.raises(BrokerUnavailable, match="authentication failed") as unknown:
        open_storage(url, ORIGIN, KEY, password="wrong")
    assert "wrong" not in str(unknown.value)


def test_an_older_database_in_its_place_is_not_written_to(postgres: PostgresServer) -> None:
    storage = open_storage(postgres.create("shrunk"), ORIGIN, KEY, password=PASSWORD)

    at = datetime(2026, 1, 31, tzinfo=UTC)
    for _ in range(3):
        storage.transact_now(lambda step: step.append(Entry("job", at, {})))
    with psycopg.connect(postgres.dsn("shrunk"), autocommit=True) as connection:
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'size'")
    with pytest.raises(BrokerUnavailable, match="older one was put in its place"):
        storage.transact_now(lambda step: step.append(Entry("job", at, {})))
    storage.close()


def test_a_copy_goes_from_one_kind_of_database_to_the_other(
    pair: Pair, tmp_path: Path, postgres: PostgresServer
) -> None:
    made = back_up(pair.folders[0], tmp_path / "copy")
    with pytest.raises(BrokerUnavailable, match="a broker runs on this database"):
        restore(pair.folders[0], tmp_path / "copy")
    other = tmp_path / "other"
    shutil.copytree(pair.folders[0], other)
    text = (other / "broker.toml").read_text()
    pair_url = text.split('database = "')[1].split('"')[0]
    fresh = postgres.create("fresh")
    (other / "broker.toml").write_text(text.replace(pair_url, fresh))
    assert restore(other, tmp_path / "copy") == made
    assert restore(other, tmp_path / "copy") == made
    again = back_up(other, tmp_path / "second")
    assert again == made
    (other / "broker.toml").write_text(text.replace(pair_url, "state/broker.sqlite"))
    assert restore(other, tmp_path / "second") == made
    with open_folder(other) as (_, database):
        read_database(database, lambda step: export_bundle(step, tmp_path / "bundle"))
    assert verify_audit(tmp_path / "bundle", pair.world.root).problems == ()
    (other / "broker.toml").write_text(text.replace(pair_url, fresh))
    with psycopg.connect(postgres.dsn("fresh"), autocommit=True) as connection:
        connection.execute("UPDATE nodes SET hash = %s", (bytes(32),))
    with pytest.raises(LedgerRefused, match="another ledger"):
        restore(other, tmp_path / "copy")


def test_a_server_that_ends_is_refused_to_and_recovers(postgres: PostgresServer) -> None:
    storage = open_storage(postgres.create("restarted"), ORIGIN, KEY, password=PASSWORD)
    at = datetime(2026, 1, 31, tzinfo=UTC)
    storage.transact_now(lambda step: step.append(Entry("job", at, {})))
    postgres.stop()
    try:
        with pytest.raises(BrokerUnavailable, match="cannot be written"):
            storage.transact_now(lambda step: step.append(Entry("job", at, {})))
        with pytest.raises(BrokerUnavailable, match="cannot be read"):
            storage.read(lambda step: step.size())
    finally:
        postgres.start()
    assert storage.transact_now(lambda step: step.append(Entry("job", at, {})))[0] == 1
    storage.close()
