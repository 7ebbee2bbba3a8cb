"""The changes of a bad day as functions, what they are called in words, and the bounds of proposals and stores."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from charter_world import NOW, World, image, parsed, signed_by
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import MetaFile

from policies.charter import Changes, Proposal, current_charter, load_charter, propose, read_store, review, write_store
from policies.charter.layout import SIGNED_DIGEST_FIELD, metadata_file
from policies.charter.runbooks import member_joins, replace_broker, replace_member_key, withdraw_image
from policies.charter.trust import signed_digest
from policies.charter.words import differences, standing
from policies.charter.written import written_target
from policies.documents import User, parse_document
from policies.errors import MalformedDocument, ProposalRefused
from policies.keys import public_pem


@pytest.fixture
def world() -> World:
    return World().found()


def said(world: World, changes: Changes) -> str:
    """What a signer reads of a change."""
    charter, shortfalls = review(propose(world.store, changes, NOW), NOW)
    lines = [change.sentence for change in differences(current_charter(world.store), charter)]
    return "\n".join([*lines, *standing(shortfalls)])


def test_a_member_joins(world: World) -> None:
    key = Ed25519PrivateKey.generate()
    charter = current_charter(world.store)
    changes = member_joins(charter, "delta-bank", public_pem(key), threshold=3, jurisdiction="FR")
    words = said(world, changes)
    assert "Member delta-bank joins, key" in words
    assert "Change the members who must sign from 2 to 3." in words
    world.keys["delta-bank"] = key
    world.store = world.amend(changes, by=("acme-pharma", "borealis-hospital", "cygnus-bio"))
    joined = load_charter(world.store, world.root, NOW, known=load_charter(world.store, world.root, NOW))
    member = joined.consortium.member("delta-bank")
    assert member is not None
    assert member.jurisdiction == "FR"
    assert joined.consortium.threshold_for("images") == 3
    with pytest.raises(ProposalRefused, match="belongs already"):
        member_joins(joined, "delta-bank", public_pem(key))


def test_a_newcomer_alone_does_not_admit_itself(world: World) -> None:
    """A raised threshold must be met by the new root, and the old one's by members of old."""
    key = Ed25519PrivateKey.generate()
    changes = member_joins(current_charter(world.store), "delta-bank", public_pem(key))
    world.keys["delta-bank"] = key
    with pytest.raises(ProposalRefused) as caught:
        world.amend(changes, by=("acme-pharma", "delta-bank"))
    assert caught.value.reasons == (
        "metadata/2.root.json: the signers of the root before it: role root needs 2 signatures, has 1 (by acme-pharma)",
    )


def test_thresholds_of_their_own(world: World) -> None:
    strict = world.with_consortium(thresholds={"images": 3, "code": 1})
    words = said(world, Changes(consortium=strict))
    assert "For images, 2 members had to sign; now 3 must." in words
    assert "For code, 2 members had to sign; now 1 must." in words
    world.store = world.amend(Changes(consortium=strict), by=("acme-pharma", "borealis-hospital", "cygnus-bio"))
    with pytest.raises(ProposalRefused) as caught:
        world.amend(world.put(image("two", "00" * 48)))
    assert [r for r in caught.value.reasons if "role images needs 3 signatures, has 2" in r]


def test_words_for_brokers_and_members(world: World) -> None:
    charter = current_charter(world.store)
    key = public_pem(Ed25519PrivateKey.generate())
    words = said(world, replace_broker(charter, "broker-1", signing_key=key, url="https://127.0.0.1:1"))
    assert "Broker broker-1 changes." in words
    words = said(world, replace_member_key(charter, "cygnus-bio", key))
    assert "Member cygnus-bio gets another key." in words
    assert "root (old keys)" in words
    moved = [{**m.model_dump(), "jurisdiction": "DE"} for m in world.consortium.members]
    assert "Member cygnus-bio moves from nowhere to DE." in said(
        world, Changes(consortium=world.with_consortium(members=tuple(moved)))
    )
    assert "Renew images" in said(world, Changes(renew=frozenset({"images"})))


@pytest.mark.parametrize("key", ["no key", "-----BEGIN PUBLIC KEY-----\n"])
def test_a_key_that_is_none_is_refused(world: World, key: str) -> None:
    with pytest.raises(ProposalRefused, match="would not fit together"):
        replace_member_key(current_charter(world.store), "cygnus-bio", key)


def skipping(world: World, to: int) -> Proposal:
    """A proposal whose images go from version 1 to `to`, coherent in itself."""
    proposal = propose(world.store, withdraw_image(current_charter(world.store), "demo"), NOW)
    images = parsed(dict(proposal.metadata), "2.images")
    images.signed.version = to
    snapshot = parsed(dict(proposal.metadata), "2.snapshot").signed
    pin = {SIGNED_DIGEST_FIELD: signed_digest(images)}
    snapshot.meta["images.json"] = MetaFile(to, unrecognized_fields=pin)
    kept = {name: raw for name, raw in proposal.metadata.items() if "images" not in name}
    kept[metadata_file("snapshot", 2)] = signed_by(snapshot)
    kept[metadata_file("images", to)] = signed_by(images.signed)
    return replace(proposal, metadata=kept)


def test_a_role_goes_one_version_further_and_no_more(world: World) -> None:
    review(skipping(world, 2), NOW)
    with pytest.raises(ProposalRefused) as caught:
        review(skipping(world, 2**31 - 1), NOW)
    assert caught.value.reasons == ("images: goes from version 1 to 2147483647",)
    with pytest.raises(ProposalRefused) as caught:
        review(skipping(world, 1), NOW)
    assert "images: version 1 is changed without a new version" in caught.value.reasons


def test_a_lapsed_charter_is_renewed(world: World) -> None:
    later = NOW + timedelta(days=400)
    shared = frozenset({"targets", "images", "enrolments", "code", "policies"})
    with pytest.raises(ProposalRefused) as caught:
        world.amend(Changes(renew=frozenset({"images"})), at=later)
    assert sum("expired on" in reason for reason in caught.value.reasons) == 4
    world.store = world.amend(Changes(renew=shared), at=later)
    charter = load_charter(world.store, world.root, later)
    assert charter.version == 2
    assert len(charter.warnings) == 2  # two members' own parts have lapsed


def test_rights_by_the_name_of_a_set(world: World) -> None:
    user = next(document for document in world.documents() if isinstance(document, User))
    text = user.model_dump_json(exclude={"rights", "name", "member"})[:-1] + ',"rights":"lead"}'
    path = "members/acme-pharma/users/ada.json"
    read = parse_document(User, written_target(path, text.encode(), "ada.json"), path)
    assert read.rights == ("submit", "operate", "view", "download")
    assert read.may("submit")
    assert not read.may("approve")
    with pytest.raises(MalformedDocument, match="none of"):
        written_target(path, text.replace("lead", "king").encode(), "ada.json")


def test_stores_in_folders_are_bounded(world: World, tmp_path: Path) -> None:
    write_store(tmp_path, world.store)
    (tmp_path / "metadata" / "big.json").write_bytes(bytes(1024 * 1024 + 1))
    with pytest.raises(MalformedDocument, match="too large"):
        read_store(tmp_path)
    (tmp_path / "metadata" / "big.json").unlink()
    deep = tmp_path / "targets" / "a/b/c/d/e/f/g/h"
    deep.mkdir(parents=True)
    with pytest.raises(MalformedDocument, match="nested too deeply"):
        read_store(tmp_path)
    with pytest.raises(MalformedDocument, match="has this name"):
        write_store(tmp_path, {"metadata/../../evil": b""})
