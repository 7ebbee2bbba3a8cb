"""Masked sums of devices: the sum is the plain one; devices vanish; a gateway lies; messages come twice."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1]))
from edge_world import JOB, EdgeWorld, found_edge

from fl.edge.cohort import Cohort, Said
from fl.edge.masks import CohortDevice, DeviceMasking, context_of, masking_of
from fl.edge.tokens import read_token
from fl.errors import MalformedTensors, MaskingRefused
from policies.errors import Refused, Unusable

MASKING = DeviceMasking(cohort=5, threshold=3, limit=4.0, seconds=10.0)
SHAPES = {"a": (3, 4), "b": (5,)}
NUMBERS = 17


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EdgeWorld:
    return found_edge(tmp_path_factory.mktemp("cohorts"))


class Party:
    """A device and what it was told last."""

    def __init__(self, world: EdgeWorld, number: int, masking: DeviceMasking = MASKING, **changes: Any) -> None:
        charter = world.federation.charter
        self.key = ec.generate_private_key(ec.SECP256R1())
        token = changes.pop("token", None) or world.token(self.key, **changes)
        self.name = read_token(token, charter(), world.moment()).name
        rng = np.random.default_rng(number)
        self.difference = {
            name: rng.normal(size=shape).astype(np.float32).clip(-3, 3) for name, shape in SHAPES.items()
        }
        self.weight = float(1 + number)
        self.context = context_of(charter().id, "job-1", 1, "ab" * 32)
        self.device = CohortDevice(
            token,
            self.key,
            job=JOB,
            context=self.context,
            masking=masking,
            difference=self.difference,
            weight=self.weight,
            charter=charter,
            clock=world.moment,
            random=os.urandom,
        )
        self.told = Said(wait=True)

    def say(self, cohort: Cohort, now: float = 0.0) -> Said:
        device = self.device
        self.told = cohort.hear(self.name, self.key.public_key(), device.step, device.body, device.tensors, now)
        if self.told.step is not None:
            device.hear(self.told.step, self.told.body)
        return self.told


def cohort_of(world: EdgeWorld, masking: DeviceMasking = MASKING) -> Cohort:
    return Cohort(masking, context_of(world.federation.charter().id, "job-1", 1, "ab" * 32), NUMBERS, 0.0)


def turns(cohort: Cohort, parties: list[Party], now: Callable[[int], float] = lambda _: 0.0, most: int = 14) -> None:
    for turn in range(most):
        for party in parties:
            if not cohort.over:
                party.say(cohort, now(turn))


def at_vectors(world: EdgeWorld) -> tuple[Cohort, list[Party]]:
    """A cohort of which the first device is about to send its vector."""
    parties, cohort = [Party(world, number) for number in range(5)], cohort_of(world)
    while parties[0].device.step != "vector":
        for party in parties:
            party.say(cohort)
    return cohort, parties


def plain(parties: list[Party]) -> np.ndarray:
    flat = [np.concatenate([one.difference[name].reshape(-1) for name in sorted(SHAPES)]) for one in parties]
    return sum(one.weight * values.astype(np.float64) for one, values in zip(parties, flat, strict=True))


def test_the_sum_is_the_plain_one_and_each_device_hears_that_it_counted(world: EdgeWorld) -> None:
    parties = [Party(world, number) for number in range(5)]
    cohort = cohort_of(world)
    turns(cohort, parties)
    assert cohort.result is not None, cohort.failed
    assert cohort.result.devices == tuple(sorted(one.name for one in parties))
    assert cohort.result.weight == 1 + 2 + 3 + 4 + 5
    np.testing.assert_allclose(cohort.result.values, plain(parties), atol=1e-6)
    assert all(one.say(cohort).counted for one in parties)


def test_a_gateway_sees_nothing_of_one_device(world: EdgeWorld) -> None:
    """Two runs of equal devices: what a device sends has nothing in common with what it sends again."""
    sent = []
    for _ in range(2):
        _, parties = at_vectors(world)
        sent.append(np.frombuffer(parties[0].device.tensors[-8 * NUMBERS :], "<u8"))
    assert not np.any(sent[0] == sent[1])
    small = np.abs(sent[0].view(np.int64)) < 2**52
    assert small.mean() < 0.5, "numbers without a mask are below 2**52"


@given(
    leaves=st.lists(st.sampled_from(["keys", "shares", "vector", "survivors", "unmask", None]), min_size=5, max_size=5)
)
@settings(max_examples=12, deadline=None)
def test_whoever_vanishes_at_whichever_step(world: EdgeWorld, leaves: list[str | None]) -> None:
    """A sum is over all whose vectors came, or there is none: never one of other numbers, never over too few."""
    parties = [Party(world, number) for number in range(5)]
    cohort = cohort_of(world)
    turns_of = {id(one): leave for one, leave in zip(parties, leaves, strict=True)}
    for turn in range(40):
        for party in parties:
            if turns_of[id(party)] != party.device.step and not cohort.over:
                party.say(cohort, 3.0 * turn)
    sent = [one for one, leave in zip(parties, leaves, strict=True) if leave not in ("keys", "shares", "vector")]
    last = [leave for leave in leaves if leave is None]
    if cohort.result is not None:
        assert cohort.result.devices == tuple(sorted(one.name for one in sent))
        assert len(sent) >= MASKING.threshold
        np.testing.assert_allclose(cohort.result.values, plain(sent), atol=1e-6)
    else:
        assert len(last) < MASKING.threshold or len(sent) < MASKING.threshold, cohort.failed


def test_a_cohort_below_the_threshold_gives_nothing(world: EdgeWorld) -> None:
    parties = [Party(world, number) for number in range(2)]
    cohort = cohort_of(world)
    turns(cohort, parties, now=lambda turn: 6.0 * turn)
    assert cohort.result is None
    assert "fewer than the threshold" in cohort.failed
    assert "fewer than the threshold" in parties[0].say(cohort, 100.0).why


def test_whoever_comes_late_or_says_two_things_is_out(world: EdgeWorld) -> None:
    parties = [Party(world, number) for number in range(5)]
    cohort = cohort_of(world)
    late = parties.pop()
    for party in parties:
        party.say(cohort, 0.0)
    parties[0].say(cohort, 11.0)
    assert "gone on without" in late.say(cohort, 12.0).why
    with pytest.raises(MaskingRefused, match="something else"):
        cohort.hear(parties[1].name, parties[1].key.public_key(), "keys", late.device.body, b"", 12.0)
    with pytest.raises(MaskingRefused, match="dealt"):
        cohort.hear(parties[1].name, parties[1].key.public_key(), "shares", "{}", b"", 12.0)
    assert parties[1].say(cohort, 12.0).step == "shares", "what was said before is answered as before"
    turns(cohort, parties, now=lambda _: 12.0)
    assert cohort.result is not None
    cohort, parties = at_vectors(world)
    with pytest.raises(MalformedTensors):
        cohort.hear(parties[0].name, parties[0].key.public_key(), "vector", "", b"x" * 100, 0.0)


def roster(parties: list[Party]) -> dict[str, str]:
    return {one.name: one.device.body for one in parties}


def test_a_gateway_cannot_make_devices_up(world: EdgeWorld) -> None:
    """It needs tokens of an issuer and signatures of the devices: neither borrowed nor of another version."""
    parties = [Party(world, number) for number in range(3)]
    honest = roster(parties)
    other_key = ec.generate_private_key(ec.SECP256R1())
    forged = json.loads(parties[1].device.body)
    forged["mask"] = "ab" * 32
    lies = {
        "not its own": {**honest, parties[1].name: json.dumps(forged)},
        "is said to be": {**honest, "phones/" + "0" * 32: parties[1].device.body},
        "token": {**honest, parties[1].name: json.dumps(forged | {"token": world.token(other_key)[:-4] + "AAAA"})},
        "takes? part|threshold|members take part": {parties[0].name: parties[0].device.body},
        "does not have this site's own": {one.name: one.device.body for one in parties[1:]}
        | {(third := Party(world, 9)).name: third.device.body},
        "malformed": {**honest, parties[1].name: "{}"},
    }
    for why, told in lies.items():
        fresh = Party(world, 0, token=None)
        said = {name: body for name, body in told.items() if name != parties[0].name}
        if parties[0].name in told:
            said[fresh.name] = fresh.device.body
        with pytest.raises((MaskingRefused, Refused), match=why):
            fresh.device.hear("shares", json.dumps(said))


def test_a_gateway_that_tells_devices_apart_learns_nothing(world: EdgeWorld) -> None:
    """Two rosters: shares do not open. Two sets of survivors, or too few: nobody reveals a share."""
    parties = [Party(world, number) for number in range(4)]
    everyone, three = roster(parties), roster(parties[:3])
    parties[0].device.hear("shares", json.dumps(everyone))
    parties[1].device.hear("shares", json.dumps(three))
    dealt = json.loads(parties[0].device.body)[parties[1].name]
    with pytest.raises(MaskingRefused, match="not its own"):
        parties[1].device.hear("vector", json.dumps({parties[0].name: dealt}))

    _, parties = at_vectors(world)
    names = [one.name for one in parties]
    with pytest.raises(MaskingRefused, match="over at least 3"):
        parties[0].device.hear("survivors", json.dumps(dict.fromkeys(names[:2], "")))
    for party, named in ((parties[1], names[:4]), (parties[2], names)):
        party.device.hear("survivors", json.dumps(dict.fromkeys(named, "")))
    with pytest.raises(MaskingRefused, match="signed the survivors"):
        parties[1].device.hear(
            "unmask", json.dumps({parties[1].name: parties[1].device.body, parties[2].name: parties[2].device.body})
        )
    with pytest.raises(MaskingRefused, match="asks for"):
        parties[1].device.hear("survivors", json.dumps(dict.fromkeys(names, "")))


def test_numbers_beyond_the_limit_are_not_sent_and_norms_are_clipped(world: EdgeWorld) -> None:
    masking = DeviceMasking(cohort=3, threshold=2, limit=4.0, seconds=10.0, clip_norm=0.5, max_weight=1.0)
    parties = [Party(world, number, masking) for number in range(3)]
    cohort = cohort_of(world, masking)
    turns(cohort, parties)
    assert cohort.result is not None
    assert cohort.result.weight == 3.0
    assert np.linalg.norm(cohort.result.values) <= 1.5 + 1e-6
    loud = Party(world, 1)
    loud.difference["a"][0, 0] = 5.0
    others = [Party(world, number) for number in range(2, 6)]
    cohort = cohort_of(world)
    with pytest.raises(MaskingRefused, match="beyond"):
        turns(cohort, [loud, *others])


def test_a_task_says_how_it_is_masked(world: EdgeWorld) -> None:
    assert masking_of({"lr": 0.1}) is None
    one = DeviceMasking(cohort=5, threshold=4, clip_norm=2.0)
    assert masking_of({"lr": 0.1, **one.config()}) == one
    for bad in ({"cohort": 5, "threshold": 2}, {"cohort": 100}, {"limit": -1.0}, {"other": 1}, {"cohort": "5"}):
        with pytest.raises(Unusable, match=r"secure_aggregation|threshold|cohort|limit|other"):
            masking_of({f"secure_aggregation.{name}": value for name, value in bad.items()})
