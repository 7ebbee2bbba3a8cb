"""Every key of a broker is replaced while guests take releases from it: none is lost, and old words stay verifiable."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import main
from attestation.broker.config import CONFIG_NAME, load_config
from attestation.broker.keks import load_kek, old_keks, replace_kek
from attestation.broker.rotation import key_state, rotate_keys
from attestation.broker.storage import read_database
from attestation.broker.upkeep import back_up, open_folder, restore
from attestation.connection import BrokerClient
from attestation.errors import BrokerUnavailable
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from policies.charter.making import amend
from policies.charter.runbooks import replace_broker
from policies.errors import SealwrightError, Unusable
from policies.keys import load_private_key

SITE_KEY = "borealis-hospital/key/data"


@pytest.fixture
def alone(tmp_path: Path, virtual_vendor: Any, virtual_chips: Any, tools: Any) -> Iterator[tuple[Any, Any]]:
    """A world of its own with its broker running."""
    world = tools.found_world(tmp_path / "world", virtual_vendor, virtual_chips, ("one",))
    broker = tools.start_broker(tmp_path / "world/one", world.entries[0])
    tools.deposit_all(world, broker.entry)
    yield world, broker
    if broker.process.poll() is None:
        broker.stop()


@contextmanager
def under_load(world: Any, broker: Any, tools: Any) -> Iterator[Callable[[int], None]]:
    """Guests that take a resource all the time; gives what waits until so many more have it. None of them may fail."""
    ended, taken, failures = threading.Event(), list[int](), list[str]()

    def take() -> None:
        guest = tools.RawGuest(world, broker.entry, world.attester("site", "north"), world.init_data["site/north"])
        try:
            guest.open().attest()
            while not ended.is_set():
                guest.post("/v1/release", json.dumps({"job": None, "resource": SITE_KEY}).encode())
                taken.append(1)
        except SealwrightError as error:
            failures.append(error.what)
        guest.client.close()

    def more(count: int) -> None:
        wanted, end = len(taken) + count, time.monotonic() + 60
        while len(taken) < wanted and not failures and time.monotonic() < end:
            time.sleep(0.02)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        more(5)
        yield more
        more(5)
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=30)
    assert failures == []
    assert len(taken) >= 10


def wait_for(found: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_the_key_encryption_key_is_replaced_under_load(alone: Any, tools: Any, capsys: Any) -> None:
    world, broker = alone
    before = key_state(broker.folder)
    assert before.resources == {before.kek: 6}
    with under_load(world, broker, tools) as more:
        for _ in range(2):
            with pytest.raises(SystemExit) as done:
                main(["broker", "rotate", "kek", str(broker.folder), "--json"])
            assert not done.value.code
            new = json.loads(capsys.readouterr().out)["to"]
            more(5)  # not told yet: it goes on with the old one
            broker.process.send_signal(signal.SIGHUP)
            wait_for(lambda new=new: key_state(broker.folder).resources == {new: 6})  # type: ignore[misc]
            more(5)
    state = key_state(broker.folder)
    assert len(state.unused) == 2
    assert before.kek in state.unused
    shutil.rmtree(old_keks(broker.folder / "keys/kek"))
    broker.stop()
    again = tools.start_broker(broker.folder, broker.entry)
    guest = world.guest()
    guest.attest()
    assert guest.release(SITE_KEY) == b"north's data key"
    guest.close()
    again.stop()


def test_a_broker_killed_while_it_rewraps_goes_on_where_it_was(alone: Any, tools: Any) -> None:
    world, broker = alone
    owner = world.member_keys["borealis-hospital"]
    client = BrokerClient(broker.entry, "virtual.trial")
    for number in range(60):
        name = f"borealis-hospital/many/n{number}"
        client.deposit(name, bytes([number]), owner, charter_id=world.charter().id)
    client.close()
    for _ in range(3):
        replace_kek(broker.folder / "keys/kek")
        broker.process.send_signal(signal.SIGHUP)
        time.sleep(0.02)
        broker.stop(signal.SIGKILL)
        broker = tools.start_broker(broker.folder, broker.entry)
    in_use = load_kek(broker.folder / "keys/kek").key_id
    wait_for(lambda: key_state(broker.folder).resources == {in_use: 66})
    guest = world.guest()
    guest.attest()
    assert guest.release(SITE_KEY) == b"north's data key"
    guest.close()
    broker.stop()


def test_a_kek_that_is_gone_is_told_and_used_again_when_it_is_back(alone: Any, tools: Any, tmp_path: Path) -> None:
    world, broker = alone
    broker.stop()
    settings = broker.folder / CONFIG_NAME
    text = settings.read_text()
    settings.write_text(
        text + 'kek = { kind = "pkcs11", uri = "pkcs11:token=t;object=k?module-path=/nothing.so", pin_env = "PIN" }\n'
        'old_keks = ["keys/kek"]\n'
    )
    broker = tools.start_broker(broker.folder, broker.entry)
    client = BrokerClient(broker.entry, "virtual.trial")
    status, raw = client._connection.call("GET", "/healthz")
    health = json.loads(raw)
    assert (status, health["ready"], health["alive"]) == (503, False, True)
    assert "token t cannot be used" in health["problems"][0]
    guest = world.guest()
    guest.attest()
    assert guest.release(SITE_KEY) == b"north's data key"  # which is under the old one still
    with pytest.raises(BrokerUnavailable, match="token t cannot be used"):
        client.deposit(SITE_KEY, b"new", world.member_keys["borealis-hospital"], charter_id=world.charter().id)
    settings.write_text(text)
    broker.process.send_signal(signal.SIGHUP)
    wait_for(lambda: client._connection.call("GET", "/healthz")[0] == 200)
    client.deposit(SITE_KEY, b"new", world.member_keys["borealis-hospital"], charter_id=world.charter().id)
    assert guest.release(SITE_KEY) == b"new"
    guest.close()
    client.close()
    broker.stop()


def test_signing_and_issuer_keys_are_replaced_through_the_charter(alone: Any, tools: Any, tmp_path: Path) -> None:
    world, broker = alone
    guest = world.guest()
    guest.attest()
    old = guest.record("job", {"n": 1})
    early = back_up(broker.folder, tmp_path / "early")
    new = rotate_keys(broker.folder, guest.now().replace(microsecond=0))
    assert json.loads((broker.folder / "next-entry.json").read_text())["signing_key"] == new.signing_key
    with pytest.raises(Unusable, match="there already"):
        rotate_keys(broker.folder, guest.now())
    assert guest.release(SITE_KEY) == b"north's data key"  # nothing has changed yet

    change = replace_broker(
        world.charter(), "one", signing_key=new.signing_key, issuer_certificate=new.issuer_certificate, url=None
    )

    next_key = load_private_key(broker.folder / "keys/next/signing.pem")
    world.store = amend(world.store, change, world.member_keys.values(), [next_key], guest.now().replace(microsecond=0))
    world.entries = (new,)
    world.publish()
    broker.process.send_signal(signal.SIGHUP)
    broker.wait_for("rotated")
    assert not (broker.folder / "keys/next/signing.pem").exists()

    renewed = BrokerClient(new, "virtual.trial")  # TLS under the new issuer, answers under the new key
    assert renewed.checkpoint()
    renewed.close()
    late = world.guest()
    late.attest()
    assert late.release(SITE_KEY) == b"north's data key"
    late.close()
    guest.close()
    with open_folder(broker.folder) as (_, database):
        read_database(database, lambda step: export_bundle(step, tmp_path / "bundle"))
    report = verify_audit(tmp_path / "bundle", world.root)
    assert report.problems == ()
    assert report.entries > old.index

    broker.stop()
    again = tools.start_broker(broker.folder, new)
    again.stop()
    (broker.folder / "state/broker.sqlite").rename(tmp_path / "away")
    assert restore(broker.folder, tmp_path / "early") == early  # its head is under the key of its own charter
    last = tools.start_broker(broker.folder, new)
    assert load_config(broker.folder / CONFIG_NAME).name == "one"
    last.stop()


def test_a_charter_that_names_keys_which_are_not_here_is_not_followed(alone: Any, tools: Any) -> None:
    world, broker = alone
    new = rotate_keys(broker.folder, datetime.now(UTC).replace(microsecond=0))

    key = load_private_key(broker.folder / "keys/next/signing.pem")
    shutil.move(broker.folder / "keys/next", broker.folder / "elsewhere")
    change = replace_broker(
        world.charter(), "one", signing_key=new.signing_key, issuer_certificate=new.issuer_certificate, url=None
    )

    at = datetime.now(UTC).replace(microsecond=0)
    world.store = amend(world.store, change, world.member_keys.values(), [key], at)
    world.publish()
    client = BrokerClient(broker.entry, "virtual.trial")
    status, raw = client._connection.call("GET", "/healthz")
    assert status == 503
    assert "signing key" in json.loads(raw)["problems"][0]
    shutil.move(broker.folder / "elsewhere", broker.folder / "keys/next")  # the operator finds them
    broker.process.send_signal(signal.SIGHUP)
    broker.wait_for("rotated")
    client.close()
