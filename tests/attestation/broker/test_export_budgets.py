"""Export budgets at real brokers: debited before an export, by one keeper, and never refilled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import main
from appliance.exports_shown import exports_of
from attestation.broker.storage import read_database
from attestation.errors import BrokerRefused, BrokerUnavailable
from attestation.evidence.report import Product
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from attestation.ledger.entry import parse_entry
from attestation.virtual.chip import Chip
from attestation.virtual.vendor import Vendor
from policies.budgets import EXPORT_KIND, keeper
from policies.charter import files_of
from policies.charter.making import Changes
from policies.documents import Allowance, BundleApproval, ExportBudget

BUNDLE, OTHER = "a" * 64, "b" * 64
NORTH, SOUTH = "borealis-hospital", "cygnus-bio"


@dataclass
class Two:
    """Two brokers: `one` of acme-pharma, `two` of borealis-hospital, which keeps that member's budget."""

    world: Any
    start: Callable[..., Any]
    running: dict[str, Any] = field(default_factory=dict)

    def up(self, *names: str) -> None:
        for name in names:
            entry = next(entry for entry in self.world.entries if entry.name == name)
            self.running[name] = self.start(self.world.folder / name, entry)

    def down(self, *names: str) -> None:
        for name in names:
            self.running.pop(name).stop()

    def database(self, name: str) -> Path:
        found: Path = self.world.folder / name / "state/broker.sqlite"
        return found

    def entries(self, name: str) -> list[Any]:
        raw = read_database(self.database(name), lambda step: step.entries(0, step.size()))
        return [parse_entry(one) for one in raw]

    def allow(self, own: Allowance | None = None, approved: Allowance | None = None) -> None:
        expires = self.world.charter().expires.replace(microsecond=0) + timedelta(days=1)
        documents: list[Any] = [
            BundleApproval(bundle=digest, job="trial", sites=("north", "south"), expires=expires, budget=approved)
            for digest in (BUNDLE, OTHER)
        ]
        if own is not None:
            documents.append(ExportBudget(member=NORTH, **own.model_dump()))
        self.world.change(Changes(put=files_of(documents)))

    def guest(self, name: str = "north") -> Any:
        guest = self.world.guest("site", name, timeout=5.0)
        guest.attest()
        return guest


def export(bits: int, *, bundle: str = BUNDLE, round_: int = 0, micro_epsilon: int = 0) -> dict[str, Any]:
    amount = {"bits": bits, "micro_epsilon": micro_epsilon, "pico_delta": 0}
    return {"job": "trial-1", "bundle": bundle, "round": round_, "recipient": "server/hub", "amount": amount}


@pytest.fixture
def two(tmp_path: Path, virtual_vendor: Vendor, virtual_chips: Mapping[Product, Chip], tools: Any) -> Iterator[Two]:
    world = tools.found_world(tmp_path, virtual_vendor, virtual_chips, ("one", "two"))
    made = Two(world, tools.start_broker)
    try:
        yield made
    finally:
        made.down(*made.running)


def spend(guest: Any, *amounts: int, **more: Any) -> list[str]:
    """Debit these; "" for each that was, the reason for each that was not."""
    found = []
    for amount in amounts:
        try:
            guest.record(EXPORT_KIND, export(amount, **more))
            found.append("")
        except BrokerRefused as error:
            found.append("; ".join(error.reasons))
    return found


def test_a_budget_binds_over_jobs_restarts_and_clones(
    two: Two, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two.allow(own=Allowance(bits=100))
    two.up("one", "two")
    assert keeper(two.world.charter().consortium, NORTH) == "two"
    guest = two.guest()
    assert spend(guest, 40) == [""]
    assert spend(guest, 40, bundle=OTHER) == [""]
    spent = f"the export budget of {NORTH} is spent: 80 of 100 bits are used, and this round takes 30"
    assert spend(guest, 30) == [spent]
    guest.close()
    two.down("two")  # a restart of the keeper, and a guest that is another machine of the same place
    two.up("two")
    clone = two.guest()
    assert spend(clone, 30, 20, 1)[0] == spent
    assert spend(clone, 0) == [""]
    assert "100 of 100 bits are used" in spend(clone, 1)[0]
    clone.close()
    kinds = [entry.kind for entry in two.entries("two")]
    assert kinds.count(EXPORT_KIND) == 4
    assert EXPORT_KIND not in [entry.kind for entry in two.entries("one")]
    two.down("one", "two")
    read_database(two.database("two"), lambda step: export_bundle(step, tmp_path / "audit"))
    report = verify_audit(tmp_path / "audit", two.world.root)
    assert report.problems == ()
    shown = exports_of(tmp_path / "audit", two.world.root)
    assert [(one.export.amount.bits, one.spent and one.spent.bits) for one in shown] == [
        (40, 40), (40, 80), (30, None), (30, None), (20, 100), (1, None), (0, 100), (1, None)
    ]  # fmt: skip
    assert {(one.site, one.owner, one.export.recipient) for one in shown} == {("north", NORTH, "server/hub")}
    assert exports_of(tmp_path / "audit", two.world.root, "south") == []
    (tmp_path / "root.json").write_bytes(two.world.root)
    with pytest.raises(SystemExit) as ended:
        main(["site", "exports", str(tmp_path / "audit"), "--trust", str(tmp_path / "root.json")])
    assert ended.value.code == 0
    assert "refused: " + spent in capsys.readouterr().out
    outcomes = [decision.outcome for decision in report.decisions if decision.what == EXPORT_KIND]
    assert outcomes.count("debited") == 4
    assert sum(outcome.startswith("refused: ") for outcome in outcomes) == 4


def test_a_bundle_s_budget_is_each_owner_s_own(two: Two) -> None:
    two.allow(approved=Allowance(bits=50, epsilon=1.0))
    two.up("one", "two")
    north, south = two.guest(), two.guest("south")
    assert spend(north, 50) == [""]
    assert f"the budget of {NORTH} for bundle {BUNDLE[:16]}… is spent" in spend(north, 1)[0]
    assert spend(north, 50, bundle=OTHER) == [""]
    assert spend(south, 50) == [""]  # kept by the charter's first broker: the member has none
    assert spend(south, 0, micro_epsilon=1_000_000) == [""]
    assert "1 of 1 epsilon are used, and this round takes 1e-06" in spend(south, 0, micro_epsilon=1)[0]
    north.close()
    south.close()


def test_no_other_broker_debits_it(two: Two) -> None:
    """A site's code that goes to another broker, and a keeper that is down: nothing is let out."""
    two.allow(own=Allowance(bits=100))
    two.up("one", "two")
    guest = two.guest()
    with pytest.raises(BrokerRefused, match="is kept by broker two, not by one"):
        guest._sessions["one"].recorded(EXPORT_KIND, export(1))
    two.down("two")
    with pytest.raises(BrokerUnavailable):
        guest.record(EXPORT_KIND, export(1))
    guest.close()


def test_what_is_no_export_is_refused(two: Two) -> None:
    two.allow()
    two.up("one", "two")
    guest = two.guest()
    good = export(1)
    for document, words in (
        ({**good, "more": 1}, "Extra inputs"),
        ({**good, "amount": {"bits": -1}}, "bits"),
        ({**good, "amount": {"bits": 1.5}}, "bits"),
        ({**good, "amount": {"bits": 2**53}}, "bits"),
        ({**good, "round": True}, "round"),
        ({**good, "bundle": "c" * 64}, "is not approved in charter"),
    ):
        with pytest.raises(Exception, match=words):
            guest.record(EXPORT_KIND, document)
    hub = two.world.guest("server", "hub", timeout=5.0)
    hub.attest()
    with pytest.raises(BrokerRefused, match="is no site"):
        hub.record(EXPORT_KIND, good)
    hub.close()
    guest.close()


def test_a_keeper_that_is_set_back_is_noticed(two: Two, tmp_path: Path) -> None:
    """Its operator restores the database of yesterday: a running guest sees the ledger shrink, and lets nothing out."""
    two.allow(own=Allowance(bits=100))
    two.up("one", "two")
    guest = two.guest()
    two.down("two")
    shutil.copytree(two.database("two").parent, tmp_path / "yesterday")
    two.up("two")
    guest.renew()
    assert spend(guest, 100) == [""]
    two.down("two")
    shutil.rmtree(two.database("two").parent)
    shutil.copytree(tmp_path / "yesterday", two.database("two").parent)
    two.up("two")
    with pytest.raises(Exception, match=r"entries, it had|knows no such session|session"):
        guest.record(EXPORT_KIND, export(1))
    guest.close()


def test_an_audit_names_a_false_balance(two: Two, tmp_path: Path) -> None:
    """What a keeper that lets more out than was agreed would have to write down."""
    two.allow(own=Allowance(bits=100))
    two.up("one", "two")
    guest = two.guest()
    assert spend(guest, 60) == [""]
    guest.close()
    two.down("one", "two")
    from attestation.ledger.entry import Entry
    from attestation.ledger.retrial import Retrial

    charter = two.world.charter()
    entries = two.entries("two")
    position, honest = next((n, entry) for n, entry in enumerate(entries) if entry.kind == EXPORT_KIND)
    body = json.loads(json.dumps(dict(honest.body)))
    blobs = read_database(two.database("two"), lambda step: {honest.body["ear"]: step.blob(honest.body["ear"])})

    def judged(*bodies: dict[str, Any]) -> list[list[str]]:
        retrial = Retrial(charter.broker("two"), {0: charter}, blobs)
        retrial.judge(0, Entry("charter", honest.time, {}))
        retrial._ears[honest.body["ear"]] = (honest.body["session"], honest.time)
        return [retrial.judge(position, Entry(EXPORT_KIND, honest.time, one)) for one in bodies]

    assert judged(body) == [[]]
    again = {**body, "spent": {"owner": body["spent"]["owner"], "bundle": body["spent"]["bundle"]}}
    (first, second) = judged(body, again)
    assert first == []
    assert any("60 of 100 bits are used, and this round takes 60" in reason for reason in second)
    false = {**body, "spent": {**body["spent"], "owner": {"bits": 1, "micro_epsilon": 0, "pico_delta": 0}}}
    assert judged(false) == [["it should not have been debited: its balance is not that of the ledger"]]
