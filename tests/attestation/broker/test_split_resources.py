"""A resource split over three brokers of three members, each a process of its own: 2 of them release it, 1 cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance.splitting import Dealt, deal_out
from attestation.broker.config import create_broker
from attestation.broker.keks import load_kek, open_resource, seal_resource
from attestation.broker.storage import open_storage, read_database
from attestation.client import BrokerClient
from attestation.errors import BrokerRefused, BrokerUnavailable, SharesMissing
from attestation.evidence.report import Product
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.ledger.checkpoint import ledger_origin
from attestation.ledger.entry import parse_entry
from attestation.split import kept_as, split_value
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.charter.layout import split_path
from policies.charter.making import Changes
from policies.errors import Refused, Unusable
from policies.keys import load_private_key

NAME = "acme-pharma/key/model"
VALUE = bytes(range(256)) * 256
"""64 KiB: the largest value that there is."""
NAMES = ("one", "two", "three")
OWNER = "acme-pharma"


@dataclass
class Three:
    """The consortium with its three brokers."""

    world: Any
    start: Callable[..., Any]
    running: dict[str, Any] = field(default_factory=dict)

    def entry(self, name: str) -> Any:
        return next(entry for entry in self.world.entries if entry.name == name)

    def up(self, *names: str) -> None:
        for name in names:
            self.running[name] = self.start(self.world.folder / name, self.entry(name))

    def down(self, *names: str) -> None:
        for name in names:
            self.running.pop(name).stop()

    def deal(self, value: bytes = VALUE, *, again: bool, k: int | None = 2) -> Dealt:
        addresses = [(entry.name, entry.url) for entry in self.world.entries]
        key = self.world.member_keys[OWNER]
        return deal_out(NAME, value, key, addresses, self.world.root, k, again=again)

    def announce(self, dealt: Dealt) -> None:
        self.world.change(Changes(put={str(split_path(NAME)): dealt.document.to_bytes()}))

    def guest(self) -> Any:
        return self.world.guest("server", "hub", timeout=3.0)

    def joined(self) -> bytes:
        guest = self.guest()
        try:
            guest.attest()
            value: bytes = guest.release(NAME)
            return value
        finally:
            guest.close()

    def kept(self, name: str) -> list[tuple[str, int]]:
        rows: list[tuple[str, int]] = read_database(
            self.world.folder / name / "state/broker.sqlite", lambda step: step.resources()
        )
        return rows

    def entries(self, name: str, kind: str) -> list[Mapping[str, Any]]:
        raw = read_database(self.world.folder / name / "state/broker.sqlite", lambda step: step.entries(0, step.size()))
        return [entry.body for entry in map(parse_entry, raw) if entry.kind == kind]

    def tamper(self, name: str, generation: int) -> None:
        """What the operator of a stopped broker can do: change the share in its own database."""
        folder, entry = self.world.folder / name, self.entry(name)
        key = load_private_key(folder / "keys/signing.pem")
        kek = load_kek(folder / "keys/kek")
        storage = open_storage(
            f"sqlite:///{folder / 'state/broker.sqlite'}", ledger_origin("virtual.trial", entry.name), key
        )
        try:
            stored = storage.read(lambda step: step.resource(kept_as(NAME, generation)))
            assert stored is not None
            value = open_resource(stored, kek)
            false = seal_resource(stored.name, stored.serial, value[:-1] + bytes([value[-1] ^ 1]), kek)
            storage.transact_now(lambda step: step.put_resource(false))
        finally:
            storage.close()


@pytest.fixture
def three(tmp_path: Path, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any) -> Iterator[Three]:
    world = tools.found_world(tmp_path, virtual_vendor, virtual_chips, NAMES)
    made = Three(world, tools.start_broker)
    try:
        made.up(*NAMES)
        yield made
    finally:
        made.down(*made.running)


@pytest.fixture
def split(three: Three) -> Three:
    """With the resource split, 2 of 3."""
    three.announce(three.deal(again=False))
    return three


def audits(three: Three, tmp_path: Path) -> dict[str, Any]:
    found = {}
    for name in NAMES:
        folder = tmp_path / f"audit-{name}"
        read_database(
            three.world.folder / name / "state/broker.sqlite", lambda step, folder=folder: export_bundle(step, folder)
        )
        found[name] = verify_audit(folder, three.world.root)
    return found


def test_two_of_three_release_it_and_the_third_may_be_down(split: Three, tmp_path: Path) -> None:
    assert split.joined() == VALUE
    for name in NAMES:
        split.down(name)
        assert split.joined() == VALUE
        split.up(name)
    for name, report in audits(split, tmp_path).items():
        assert report.problems == (), name
        assert "released" in [decision.outcome for decision in report.decisions]
    (first, *_) = split.entries("two", "release") or split.entries("three", "release")
    assert (first["resource"], first["generation"]) == (NAME, 1)
    assert first["share"] in (1, 2, 3)


def test_two_down_are_named(split: Three) -> None:
    split.down("two", "three")
    with pytest.raises(BrokerUnavailable) as waiting:
        split.joined()
    told = "; ".join(waiting.value.reasons)
    assert "1 good shares, 2 are needed" in told
    assert all(f"{name}: it has not affirmed this guest" in told for name in ("two", "three"))


def test_a_broker_that_lies_is_named_and_the_others_join(split: Three, tmp_path: Path) -> None:
    split.down("one")
    split.tamper("one", 1)
    split.up("one")
    guest = split.guest()
    try:
        guest.attest()
        assert guest.release(NAME) == VALUE
        assert guest.false_shares == {"one": "the share is not the one that the owner dealt"}
    finally:
        guest.close()
    told = [body["document"] for name in ("two", "three") for body in split.entries(name, "false-share")]
    assert told == [
        {
            "broker": "one",
            "generation": 1,
            "reason": "the share is not the one that the owner dealt",
            "resource": NAME,
        }
    ]
    split.down("two")
    with pytest.raises(BrokerUnavailable) as missing:  # when two comes back there are enough
        split.joined()
    assert "one: the share is not the one that the owner dealt" in missing.value.reasons
    assert any(reason.startswith("two: ") for reason in missing.value.reasons)
    assert all(report.problems == () for report in audits(split, tmp_path).values())


def test_no_broker_has_it_whole(three: Three) -> None:
    client = BrokerClient(three.entry("one"), "virtual.trial")
    key, charter = three.world.member_keys[OWNER], three.world.charter().id
    client.deposit(NAME, VALUE[:100], key, charter_id=charter)
    assert [name for name, _ in three.kept("one")] == [NAME]
    dealt = three.deal(again=False)
    assert [name for name, _ in three.kept("one")] == [NAME, f"{NAME}#1"], "until the charter says so"
    assert three.joined() == VALUE[:100]
    three.announce(dealt)
    assert three.joined() == VALUE
    assert [name for name, _ in three.kept("one")] == [f"{NAME}#1"]
    with pytest.raises(BrokerRefused, match="no broker keeps it whole"):
        client.deposit(NAME, VALUE[:100], key, charter_id=charter)
    client.close()


def test_shares_that_a_broker_does_not_take(split: Three) -> None:
    client = BrokerClient(split.entry("one"), "virtual.trial")
    key, charter = split.world.member_keys[OWNER], split.world.charter().id
    _, again = split_value(NAME, VALUE, NAMES, 2, 1, os.urandom)
    _, later = split_value(NAME, VALUE, NAMES, 2, 2, os.urandom)
    other = split.world.member_keys["cygnus-bio"]
    for value, generation, signer, why in (
        (again["one"], 1, key, "not the one that the owner dealt"),
        (later["one"], 1, key, "of generation 2, the charter's is 1"),
        (again["one"], 2, key, "of generation 1, the deposit of 2"),
        (b"no share", 2, key, "no share of a split resource"),
        (later["one"], 2, other, "signature is not"),
    ):
        with pytest.raises(BrokerRefused, match=why):
            client.deposit(NAME, value, signer, charter_id=charter, generation=generation)
    client.close()
    assert split.joined() == VALUE


def test_a_refresh_takes_over_when_the_charter_moves(split: Three, tmp_path: Path) -> None:
    (before,) = {split.world.charter().split(NAME).generation}
    dealt = split.deal(again=True, k=None)
    assert (dealt.document.generation, dealt.document.k) == (before + 1, 2)
    assert split.joined() == VALUE, "the shares of before, until the charter moves"
    assert sorted(name for name, _ in split.kept("two")) == [f"{NAME}#1", f"{NAME}#2"]
    split.announce(dealt)
    assert split.joined() == VALUE
    assert [name for name, _ in split.kept("one")] == [f"{NAME}#2"]
    client = BrokerClient(split.entry("one"), "virtual.trial")
    _, old = split_value(NAME, VALUE, NAMES, 2, 1, os.urandom)
    key, charter = split.world.member_keys[OWNER], split.world.charter().id
    with pytest.raises(BrokerRefused, match="older than the charter's"):
        client.deposit(NAME, old["one"], key, charter_id=charter, generation=1)
    client.close()
    assert {body["generation"] for name in NAMES for body in split.entries(name, "release")} == {1, 2}
    assert all(report.problems == () for report in audits(split, tmp_path).values())


def test_shares_of_two_generations_do_not_join(split: Three) -> None:
    """Two brokers follow the new charter, the third does not hear of it: its share of before is of no use."""
    dealt = split.deal(again=True)
    split.world.change(Changes(put={str(split_path(NAME)): dealt.document.to_bytes()}), to=("one", "two"))
    split.down("two")
    guest = split.guest()
    try:
        guest.attest()
        with pytest.raises((BrokerUnavailable, SharesMissing, BrokerRefused)) as refused:
            guest.release(NAME)
        assert guest.false_shares == {}
        assert "generation" in refused.value.what or "version" in refused.value.what or "affirmed" in refused.value.what
    finally:
        guest.close()
    split.up("two")
    assert split.joined() == VALUE


def test_a_replaced_broker_gets_its_share_by_a_refresh(split: Three) -> None:
    old = split.entry("two")
    split.down("two")
    (split.world.folder / "two").rename(split.world.folder / "two-before")
    at = split.world.charter().expires.now(tz=split.world.charter().expires.tzinfo).replace(microsecond=0)
    listen = old.url.removeprefix("https://")
    new = create_broker(split.world.folder / "two", name="two", member=old.member, url=old.url, listen=listen, at=at)
    consortium = split.world.charter().consortium
    brokers = tuple(new if broker.name == "two" else broker for broker in consortium.brokers)
    split.world.entries = brokers
    split.world.change(Changes(consortium=consortium.model_copy(update={"brokers": brokers})))
    split.up("two")
    assert split.joined() == VALUE, "the two others still join"
    split.announce(split.deal(again=True))
    split.down("one")
    assert split.joined() == VALUE, "with the new broker's share"


def test_what_makes_no_split(three: Three, split: Three) -> None:
    with pytest.raises(Unusable, match="is split already"):
        three.deal(again=False)
    entries = three.world.entries
    key = three.world.member_keys[OWNER]
    two = [(entry.name, entry.url) for entry in entries[:2]]
    with pytest.raises(Unusable, match="more than half"):
        deal_out(NAME, VALUE, key, two, three.world.root, 1, again=True)
    with pytest.raises(Refused) as refused:
        deal_out(NAME, VALUE, three.world.member_keys["cygnus-bio"], two, three.world.root, 2, again=True)
    assert {reason.partition(":")[0] for reason in refused.value.reasons} == {"one", "two"}
    assert any("signature" in reason or "belongs to" in reason for reason in refused.value.reasons)
    assert three.joined() == VALUE


def test_an_owner_whose_policy_says_no_is_asked_at_every_broker(split: Three) -> None:
    guest = split.world.guest("site", "north", timeout=3.0)
    try:
        guest.attest()
        with pytest.raises(SharesMissing) as refused:
            guest.release(NAME)
        told = "; ".join(refused.value.reasons)
        assert all(f"{name}: owner's policy" in told for name in NAMES)
    finally:
        guest.close()
