"""What a charter says about witnesses: how many must cosign, whose count, and how that is read to a signer."""

from __future__ import annotations

from typing import Any

import pytest
from charter_world import MEMBERS, NOW, World, issuer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from policies.charter import Changes, load_charter
from policies.charter.runbooks import replace_broker
from policies.charter.words import differences
from policies.documents import Consortium, Witness, parse_document
from policies.errors import MalformedDocument
from policies.keys import public_pem


def witness(name: str, member: str, **more: Any) -> Witness:
    key = public_pem(Ed25519PrivateKey.generate())
    return Witness(name=name, member=member, url=f"https://{name}.example/v1/witness", public_key=key, **more)


def demanding(old: Consortium, threshold: int, *witnesses: Witness) -> Consortium:
    return Consortium(**{**dict(old), "witnesses": witnesses, "witness_threshold": threshold})


@pytest.fixture
def consortium() -> Consortium:
    return World().consortium


def other_members(consortium: Consortium) -> list[str]:
    return [name for name in MEMBERS if name != consortium.brokers[0].member]


def test_without_witnesses_nothing_is_written(consortium: Consortium) -> None:
    assert consortium.witness_threshold == 0
    assert b"witness_threshold" not in consortium.to_bytes()
    lone = witness("w", MEMBERS[0])
    assert b"issuer_certificate" not in lone.to_bytes()


def test_as_many_as_must_cosign_are_there_for_each_broker(consortium: Consortium) -> None:
    broker = consortium.brokers[0]
    first, second = other_members(consortium)
    three = (witness("w1", first), witness("w2", second), witness("own", broker.member))
    found = demanding(consortium, 2, *three)
    assert [one.name for one in found.witnesses_of(broker)] == ["w1", "w2"]
    with pytest.raises(ValueError, match=r"3 cannot cosign the ledger of .* 2 witnesses of other"):
        demanding(consortium, 3, *three)
    with pytest.raises(ValueError, match="witness_threshold"):
        demanding(consortium, 1, three[2])


def test_a_witness_has_a_key_of_its_own(consortium: Consortium) -> None:
    taken = witness("w1", other_members(consortium)[0]).model_copy(
        update={"public_key": consortium.brokers[0].signing_key}
    )
    with pytest.raises(ValueError, match="one key is given to two parties"):
        demanding(consortium, 0, taken)


def test_its_tls_certificate_must_issue() -> None:
    good = witness("w1", MEMBERS[0], issuer_certificate=issuer("w1"))
    assert parse_document(Witness, good.to_bytes(), "w1") == good
    with pytest.raises(MalformedDocument):
        parse_document(Witness, good.to_bytes().replace(b"MII", b"MIJ", 1), "w1")


def test_a_signer_reads_it() -> None:
    world = World().found()
    before = load_charter(world.store, world.root, NOW)
    first, second = other_members(before.consortium)
    new = demanding(before.consortium, 1, witness("w1", first), witness("w2", second), witness("w3", second))
    after = load_charter(world.amend(Changes(consortium=new)), world.root, NOW)
    sentences = [change.sentence for change in differences(before, after)]
    assert "Change the witnesses who must cosign a ledger from 0 to 1." in sentences
    assert sum(sentence.startswith("Add the witness") for sentence in sentences) == 3
    assert any("1 of 3 witnesses can cosign one ledger of broker-1" in sentence for sentence in sentences)
    founded = [change.sentence for change in differences(None, after)]
    assert any(sentence.startswith("1 witnesses must cosign") for sentence in founded)


def test_a_witness_in_a_broker_moves_with_it() -> None:
    world = World()
    broker = world.consortium.brokers[0]
    inside = witness("broker-1", broker.member, issuer_certificate=broker.issuer_certificate).model_copy(
        update={"url": f"{broker.url}/v1/witness"}
    )
    alone = witness("w1", MEMBERS[1], issuer_certificate=issuer("w1"))
    world.consortium = demanding(world.consortium, 1, inside, alone)
    charter = load_charter(world.found().store, world.root, NOW)
    fresh = issuer("next")
    changed = replace_broker(charter, "broker-1", issuer_certificate=fresh, url="https://elsewhere.example:9443")
    assert changed.consortium is not None
    moved, same = changed.consortium.witnesses
    assert (moved.issuer_certificate, moved.url) == (fresh, "https://elsewhere.example:9443/v1/witness")
    assert (moved.public_key, same) == (inside.public_key, alone)
