"""Changing a charter: what may be said where, and what nobody signs or publishes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from charter_world import NOW, World, both, bundle, compact, enrolment, image, parsed, signed_by, user

from policies.charter import Changes, Proposal, files_of, load_charter, propose, propose_founding, publish, sign
from policies.errors import ProposalRefused


@pytest.fixture
def world() -> World:
    return World().found()


# --- what the charter says --------------------------------------------------------------------------------------------


def test_documents_must_be_what_their_path_says(world: World) -> None:
    wrong = {
        "images/other.json": image("demo").to_bytes(),
        "enrolments/site/x.json": enrolment("server", "x", "acme-pharma").to_bytes(),
        f"code/{'34' * 32}.json": bundle().to_bytes(),
        "members/acme-pharma/users/eve.json": user("acme-pharma", "ada").to_bytes(),
        "images/spaced.json": image("spaced").to_bytes() + b" ",
        "policies/floor.rego": b"package sealwright.release\n",
        "policies/appraisal.toml": b"= broken",
        "members/acme-pharma/release/key.model.rego": b"# package sealwright.release\n",
    }
    for path, raw in wrong.items():
        with pytest.raises(ProposalRefused) as caught:
            propose(world.store, Changes(put={path: raw}), NOW)
        assert any(path in reason for reason in caught.value.reasons), path


def test_users_have_certificates_of_their_own_name_and_domain(world: World) -> None:
    for eve in (
        user("acme-pharma", "eve", san="spiffe://virtual.research.example/user/acme-pharma/ada"),
        user("acme-pharma", "eve", trust_domain="research.example"),
        user("borealis-hospital", "eve").model_copy(update={"member": "acme-pharma"}),
    ):
        with pytest.raises(ProposalRefused) as caught:
            propose(world.store, world.put(eve), NOW)
        assert "the TLS certificate is for" in caught.value.reasons[0]


def test_strangers_are_neither_enrolled_nor_owners(world: World) -> None:
    for files in (
        files_of([enrolment("site", "delta", "delta-bank")]),
        files_of([user("delta-bank", "dan")]),
        {"members/delta-bank/release/key.data.rego": b"package sealwright.release\n"},
    ):
        with pytest.raises(ProposalRefused):
            propose(world.store, Changes(put=files), NOW)


def test_one_measurement_belongs_to_one_image(world: World) -> None:
    with pytest.raises(ProposalRefused) as caught:
        propose(world.store, world.put(image("twin")), NOW)
    assert "images demo, twin claim the same measurement" in caught.value.reasons[0]


def test_two_resources_never_share_a_release_policy(world: World) -> None:
    """`a.b/c` and `a/b.c` would both be `a.b.c.rego`: a type has no dot."""
    charter = load_charter(
        world.amend(
            Changes(put={"members/borealis-hospital/release/a.b.c.rego": b"package sealwright.release\n"}),
        ),
        world.root,
        NOW,
    )
    assert charter.release_policy("borealis-hospital/a/b.c") is not None
    assert charter.release_policy("borealis-hospital/a.b/c") is None


# --- proposals --------------------------------------------------------------------------------------------------------


def tampered(proposal: Proposal, name: str, raw: bytes) -> Proposal:
    return replace(proposal, metadata={**proposal.metadata, name: raw})


def test_nobody_signs_a_proposal_that_would_not_hold(world: World) -> None:
    proposal = propose(world.store, world.put(image("two", "00" * 48)), NOW)
    skipping = parsed(dict(proposal.metadata), "2.snapshot").signed
    skipping.version = 3
    with pytest.raises(ProposalRefused):
        sign(tampered(proposal, "metadata/2.snapshot.json", signed_by(skipping)), world.keys["acme-pharma"], NOW)
    hiding = replace(proposal, targets={**proposal.targets, "targets/images/x.json": b"{}"})
    sign(hiding, world.keys["acme-pharma"], NOW)  # what nothing lists is left out
    assert "targets/images/x.json" not in hiding.store()


def test_a_proposal_on_a_false_base_is_not_signed_by_who_brings_the_root(world: World) -> None:
    other = World().found()
    proposal = propose(other.store, other.put(image("two", "00" * 48)), NOW)
    with pytest.raises(ProposalRefused):
        sign(proposal, other.keys["acme-pharma"], NOW, root=world.root)
    with pytest.raises(ProposalRefused, match="founds another charter"):
        sign(propose_founding(other.consortium, {}, NOW), other.keys["acme-pharma"], NOW, root=world.root)


def test_a_proposal_on_an_old_base_is_not_published(world: World) -> None:
    late = propose(world.store, world.put(image("two", "00" * 48)), NOW)
    for key in both(world):
        late = sign(late, key, NOW)
    world.store = world.amend(Changes(remove=frozenset({"images/demo.json"})))
    with pytest.raises(ProposalRefused, match="moved on"):
        publish(world.store, late, NOW)


def test_a_signature_from_one_proposal_does_not_serve_another(world: World) -> None:
    good = sign(propose(world.store, world.put(image("two", "00" * 48)), NOW), world.keys["acme-pharma"], NOW)
    evil = propose(world.store, world.put(image("evil", "11" * 48)), NOW)
    document = json.loads(evil.metadata["metadata/2.images.json"])
    document["signatures"] = json.loads(good.metadata["metadata/2.images.json"])["signatures"]
    with pytest.raises(ProposalRefused) as caught:
        sign(tampered(evil, "metadata/2.images.json", compact(document)), world.keys["cygnus-bio"], NOW)
    assert "the signature by acme-pharma is not valid" in caught.value.reasons[0]
