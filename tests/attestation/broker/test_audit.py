"""An audit from the root alone: a sound story is affirmed, and any changed, missing or foreign file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attestation.broker.storage import read_database
from attestation.client import BrokerClient, GuestSession
from attestation.errors import BrokerRefused
from attestation.ledger.audit import verify_audit
from attestation.ledger.bundle import export_bundle
from policies.errors import Refused, Unusable

Guests = Callable[..., GuestSession]


@pytest.fixture(scope="module")
def bundle(world: Any, broker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The audit of a broker that saw affirmed and refused guests, releases, denials, records and two charters."""
    guest = world.guest("site", "north")
    guest.attest()
    guest.release("borealis-hospital/key/data")
    with suppress(BrokerRefused):
        guest.release("acme-pharma/key/model")
    guest.record("job", {"job": "trial"})
    debugged = world.guest("site", "south", policy=0xB0000)
    with suppress(BrokerRefused):
        debugged.attest()
    client = BrokerClient(broker.entry, "virtual.trial")
    with suppress(Refused):
        key = world.member_keys["cygnus-bio"]
        client.deposit("acme-pharma/key/model", b"theirs", key, charter_id=world.charter().id)
    world.change(world_change(world))
    hub = world.guest("server", "hub")
    hub.attest()
    hub.release("acme-pharma/key/model")
    for one in (guest, debugged, hub, client):
        one.close()
    folder = tmp_path_factory.mktemp("audit") / "bundle"
    read_database(broker.folder / "state/broker.sqlite", lambda step: export_bundle(step, folder))
    return folder


def world_change(world: Any) -> Any:
    from policies.charter.making import Changes

    text = world.charter().files["policies/floor.rego"]
    return Changes(put={"policies/floor.rego": text + b"\n# reviewed again\n"})


def test_the_whole_story_is_affirmed(bundle: Path, world: Any) -> None:
    report = verify_audit(bundle, world.root)
    assert report.problems == ()
    assert report.broker == "one"
    assert report.platform == "virtual"
    assert {"appraisal", "charter", "credential", "denial", "deposit", "job", "release"} <= set(report.kinds)
    assert report.kinds["charter"] == 2
    outcomes = {(decision.who, decision.what): decision.outcome for decision in report.decisions}
    assert outcomes["site/north", "borealis-hospital/key/data"] == "released"
    assert outcomes["site/north", "acme-pharma/key/model"].startswith("refused")
    assert "policy-debug" in outcomes["site/south", "attest"]
    assert report.to_json()["status"] == "affirming"


def names_of(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def flip_and_look(bundle: Path, copy: Path, root: bytes, names: list[str], positions: int) -> None:
    """Flip one bit at several places of each file, and demand that the audit names this very file."""
    shutil.copytree(bundle, copy)
    for step, name in enumerate(names):
        whole = (copy / name).read_bytes()
        for place in range(positions):
            changed = bytearray(whole)
            changed[(len(whole) - 1) * place // max(1, positions - 1)] ^= 1 << ((step + place) % 8)
            (copy / name).write_bytes(bytes(changed))
            problems = verify_audit(copy, root).problems
            assert any(problem.file == name for problem in problems), (name, place, problems)
        (copy / name).write_bytes(whole)
    assert verify_audit(copy, root).ok


def test_one_flipped_byte_in_a_file_of_each_kind_is_noticed_and_named(bundle: Path, world: Any, tmp_path: Path) -> None:
    names = names_of(bundle)
    sample = ["checkpoint"]
    for kind in ("entries/", "receipts/", "blobs/"):
        sample += [name for name in names if name.startswith(kind)][::8]
    sample += [name for name in names if name.startswith("charter/")][::12]
    flip_and_look(bundle, tmp_path / "bundle", world.root, sample, 2)


@pytest.mark.long
def test_one_flipped_byte_in_any_file_is_noticed_and_named(bundle: Path, world: Any, tmp_path: Path) -> None:
    flip_and_look(bundle, tmp_path / "bundle", world.root, names_of(bundle), 5)


def test_missing_and_foreign_files_are_named(bundle: Path, world: Any, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    last = sorted((copy / "entries").iterdir())[-1].name
    for name in ("checkpoint", "entries/00000001.json", f"entries/{last}", "receipts/00000000.json"):
        whole = (copy / name).read_bytes()
        (copy / name).unlink()
        assert any(problem.file == name for problem in verify_audit(copy, world.root).problems), name
        (copy / name).write_bytes(whole)
    for name in ("notes.txt", "blobs/" + "0" * 64, "entries/99999999.json", "charter/9.9/metadata/x.json", "entries/x"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"{}")
        assert any(problem.file == name for problem in verify_audit(copy, world.root).problems), name
        (copy / name).unlink()
    (copy / "link").symlink_to(copy / "checkpoint")
    assert any(problem.file == "link" for problem in verify_audit(copy, world.root).problems)


def test_another_root_is_refused(bundle: Path, world: Any) -> None:
    report = verify_audit(bundle, world.root.replace(b"trial", b"other"))
    assert not report.ok
    assert report.to_json()["status"] == "contraindicated"


def test_a_story_that_ends_earlier_needs_its_own_head(bundle: Path, world: Any, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    last = sorted((copy / "entries").iterdir())[-1].name
    (copy / "entries" / last).unlink()
    (copy / "receipts" / last).unlink()
    assert any(problem.file == f"entries/{last}" for problem in verify_audit(copy, world.root).problems)


def test_no_bundle_is_unusable(tmp_path: Path, world: Any) -> None:
    with pytest.raises(Unusable):
        verify_audit(tmp_path / "nothing", world.root)


def test_what_rules_are_asked_in_earnest_fits_the_schemas(
    bundle: Path, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The auditor asks again what the broker asked: appraisals, and releases by floor and owner."""
    from policies import questions
    from policies.decisions import Asked, Decision, Rules
    from policies.inputs import input_complaints

    asked: list[tuple[str, Any]] = []
    ask, decide_all = questions.ask, Rules.decide_all

    def asks(charter: Any, subject: Any, document: Any) -> Any:
        asked.append((subject, document))
        return ask(charter, subject, document)

    def decides(them: list[Asked]) -> list[Decision]:
        asked.extend((one.package.removeprefix("sealwright."), json.loads(one.given.content)) for one in them)
        return decide_all(them)

    monkeypatch.setattr(questions, "ask", asks)
    monkeypatch.setattr(Rules, "decide_all", decides)
    assert verify_audit(bundle, world.root).ok
    assert {"appraisal", "floor", "release"} <= {package for package, _ in asked}
    for package, document in asked:
        assert input_complaints(package, document) == []
