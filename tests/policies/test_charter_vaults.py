"""Recovering a vault: a document of the charter that the threshold signs, and nobody alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from charter_world import NOW, World

from policies.charter import Changes, files_of, load_charter, propose, publish, sign
from policies.charter.words import differences
from policies.charter.written import written_target
from policies.documents import Split, parse_document
from policies.errors import MalformedDocument, ProposalRefused
from policies.vaults import VaultRecovery

VAULT = "borealis-hospital/vault-site/borealis"
PATH = "enrolments/vault-site/borealis.json"


def recovery(**changes: Any) -> VaultRecovery:
    words = {
        "role": "site",
        "name": "borealis",
        "member": "borealis-hospital",
        "number": 1,
        "generation": 7,
        "to_role": "site",
        "to_name": "borealis",
    }
    return VaultRecovery.model_validate({**words, **changes})


@pytest.fixture
def world() -> World:
    return World().found()


def test_the_threshold_recovers_a_vault_and_one_member_does_not(world: World) -> None:
    proposal = sign(propose(world.store, world.put(recovery()), NOW), world.keys["borealis-hospital"], NOW)
    with pytest.raises(ProposalRefused) as caught:
        publish(world.store, proposal, NOW)
    assert any("role enrolments needs 2 signatures, has 1" in reason for reason in caught.value.reasons)
    before = load_charter(world.store, world.root, NOW)
    after = load_charter(world.amend(world.put(recovery())), world.root, NOW)
    assert before.recovery(VAULT) is None
    assert after.recovery(VAULT) == recovery()
    assert after.recoveries() == (recovery(),)
    assert after.recovery("acme-pharma/vault-site/borealis") is None, "of another member's place"
    assert after.recovery("borealis-hospital/key/data") is None
    assert after.warnings == before.warnings


def test_its_signers_read_what_it_does(world: World) -> None:
    before = load_charter(world.store, world.root, NOW)
    for document, said in (
        (
            recovery(),
            f"recovery 1 of the vault {VAULT}: site borealis goes on from its store of generation 7, whatever",
        ),
        (recovery(generation=0), "goes on from nothing: it begins anew, and what it holds now is lost"),
        (recovery(to_name="cygnus"), "site cygnus goes on from"),
    ):
        after = load_charter(world.amend(world.put(document)), world.root, NOW)
        (change,) = differences(before, after)
        assert said in change.sentence


def test_what_is_written_by_hand(tmp_path: Path) -> None:
    table = b'member = "borealis-hospital"\nnumber = 1\ngeneration = 7\nto_role = "site"\nto_name = "borealis"\n'
    assert written_target(PATH, table, "recovery.toml") == recovery().to_bytes()
    assert parse_document(VaultRecovery, recovery().to_bytes(), PATH) == recovery()
    for path, text in (
        (PATH, table + b'note = "x"\n'),
        (PATH, table.replace(b"number = 1", b"number = 0")),
        (PATH, table.replace(b"generation = 7", b"generation = -1")),
        ("enrolments/vault-king/borealis.json", table),
        ("enrolments/vault-site/a/b.json", table),
    ):
        with pytest.raises(MalformedDocument):
            written_target(path, text, "recovery.toml")


def test_what_does_not_fit(world: World) -> None:
    split = Split(
        member="borealis-hospital",
        type="vault-site",
        tag="borealis",
        k=2,
        brokers=("broker-1", "broker-2"),
        generation=1,
        commitments=dict.fromkeys(("broker-1", "broker-2"), "a" * 64),
    )
    for files, why in (
        (files_of([recovery(member="delta-bank")]), "delta-bank is not a member"),
        ({PATH: recovery(name="cygnus").to_bytes()}, "says name cygnus"),
        ({PATH: recovery().to_bytes() + b" "}, "canonical"),
        ({"members/borealis-hospital/split/vault-site.borealis.json": split.to_bytes()}, "a vault's key"),
    ):
        with pytest.raises(ProposalRefused) as caught:
            propose(world.store, Changes(put=files), NOW)
        assert any(why in reason for reason in caught.value.reasons), caught.value.reasons
    lost = load_charter(world.amend(world.put(recovery(to_name="nobody"))), world.root, NOW)
    assert f"{PATH}: site nobody is not enrolled" in lost.warnings
