"""Several brokers: the time on a charter needs as many as the consortium says."""

from __future__ import annotations

from datetime import timedelta

import pytest
from charter_world import NOW, World, image, issuer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from policies.charter import found, load_charter, sign_timestamp
from policies.documents import BrokerEntry
from policies.errors import CharterRefused, ProposalRefused
from policies.keys import public_pem


@pytest.fixture
def keys() -> list[Ed25519PrivateKey]:
    return [Ed25519PrivateKey.generate() for _ in range(3)]


@pytest.fixture
def world(keys: list[Ed25519PrivateKey]) -> World:
    world = World()
    brokers = tuple(
        BrokerEntry(
            name=f"broker-{number}",
            member=member,
            url=f"https://127.0.0.1:{8443 + number}",
            signing_key=public_pem(key),
            issuer_certificate=issuer(f"broker-{number}"),
        ).model_dump()
        for number, (member, key) in enumerate(zip(world.keys, keys, strict=True))
    )
    world.consortium = world.with_consortium(brokers=brokers, broker_threshold=2)
    world.store = found(world.consortium, world.files(), world.keys.values(), keys[:2], NOW)
    return world


def reasons(world: World, store: dict[str, bytes]) -> str:
    with pytest.raises(CharterRefused) as caught:
        load_charter(store, world.root, NOW)
    return "\n".join(caught.value.reasons)


def test_two_of_three_brokers_put_the_time_on(world: World, keys: list[Ed25519PrivateKey]) -> None:
    charter = load_charter(world.store, world.root, NOW)
    assert charter.versions["timestamp"] == 1
    store = sign_timestamp(world.store, keys[2], NOW)
    assert "role timestamp needs 2 signatures, has 1 (by broker broker-2)" in reasons(world, store)
    store = sign_timestamp(store, keys[0], NOW)
    assert load_charter(store, world.root, NOW, known=charter).versions["timestamp"] == 2


def test_one_broker_cannot_do_it_twice(world: World, keys: list[Ed25519PrivateKey]) -> None:
    store = sign_timestamp(sign_timestamp(world.store, keys[0], NOW), keys[0], NOW)
    assert "has 1 (by broker broker-0)" in reasons(world, store)


def test_a_second_broker_does_not_join_a_timestamp_over_an_older_snapshot(
    world: World, keys: list[Ed25519PrivateKey]
) -> None:
    half = sign_timestamp(world.store, keys[0], NOW)
    world.store = half
    world.broker_key = keys[1]
    newer = world.amend(world.put(image("two", "00" * 48)))
    assert "has 1 (by broker broker-1)" in reasons(world, newer)
    both = sign_timestamp(newer, keys[0], NOW)
    assert load_charter(both, world.root, NOW).version == 2


def test_a_second_broker_does_not_join_a_lapsed_timestamp(world: World, keys: list[Ed25519PrivateKey]) -> None:
    half = sign_timestamp(world.store, keys[0], NOW, timedelta(minutes=1))
    later = NOW + timedelta(minutes=2)
    store = sign_timestamp(half, keys[1], later)
    with pytest.raises(CharterRefused):
        load_charter(store, world.root, later)
    assert load_charter(sign_timestamp(store, keys[0], later), world.root, later).versions["timestamp"] == 3


def test_a_threshold_that_no_brokers_reach_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="can never sign"):
        world.with_consortium(broker_threshold=4)
    with pytest.raises(ProposalRefused):
        sign_timestamp({}, world.broker_key, NOW)
