"""The tree in one process: sums reach the root through any shape, duplicates count once, kills cost what is unsent."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.edge.branch import bounds_of
from fl.edge.contract import EdgeJob, Update, contribution_id, contribution_of
from fl.edge.embedded import EmbeddedTree
from fl.edge.fedbuff import FedBuff
from fl.edge.settings import DeviceManagerConfig, DevicePrivacy, EdgeSettings, ModelManagerConfig
from fl.errors import RecipeUnusable
from fl.tensors import TensorSpec, encode, parse
from fl.transport.memory import SealedMemory

SCHEMA = {"w": TensorSpec("F32", (4,))}


def tree(depth: int, width: int, updates: int, selection: int, last: int = 50) -> tuple[FedBuff, EmbeddedTree]:
    chosen = EdgeSettings(
        models=ModelManagerConfig(num_updates_for_model=updates, global_lr=1.0, max_model_version=last),
        devices=DeviceManagerConfig(device_selection_size=selection),
    )
    first = SealedMemory.of(encode({"w": (SCHEMA["w"], bytes(16))}))
    buff = FedBuff(SCHEMA, first, chosen, np.random.default_rng(1))
    made = EmbeddedTree(buff, EdgeJob("job-1", "toy", "edge"), SCHEMA, depth=depth, width=width, clock=lambda: 0.0)
    return buff, made


def update(device: int, version: int) -> Update:
    delta = np.random.default_rng(device).standard_normal(4).astype(np.float32)
    return Update(version, {"w": delta}, 1.0, contribution_id("job-1", version, str(device)))


def model(buff: FedBuff) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    newest = buff.models[buff.version]
    return parse(newest.view, max_size=newest.size).array("w").copy()


@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 30), min_size=4, max_size=40), st.randoms())
@settings(max_examples=40, deadline=None)
def test_any_tree_makes_the_same_model(depth: int, width: int, reports: list[int], chance: random.Random) -> None:
    """Devices report to gateways at random, some to several; the root makes what one server would have made."""
    distinct = sorted(set(reports))
    buff, grown = tree(depth, width, len(distinct), len(distinct))
    for device in reports:
        chance.choice(grown.gateways).branch.add(update(device, 1))
        if chance.random() < 0.2:
            grown.exchange()
    for _ in range(depth + 2):  # a claim's answer, then a sum, climbs one tier in one moment
        grown.exchange()
    assert buff.version == 2
    assert not buff.refused
    mean = np.mean([update(device, 1).tensors["w"].astype(np.float64) for device in distinct], axis=0)
    np.testing.assert_allclose(model(buff), mean, rtol=1e-5, atol=1e-6)
    buff.close()


def test_permits_reach_the_gateways_whose_devices_wait_and_no_more() -> None:
    buff, grown = tree(2, 3, 5, 7)
    for number in range(40):
        assert grown.gateways[number % 2].branch.select(str(number)) is None
    for _ in range(4):
        grown.exchange()
    given_out = Counter(
        at for at, gateway in enumerate(grown.gateways) for _ in range(20) if gateway.branch.select("x") is not None
    )
    assert sum(given_out.values()) == 7
    assert set(given_out) <= {0, 1}
    assert buff.under_way == 7
    buff.close()


@pytest.mark.parametrize("seed", range(5))
def test_chaos_gateways_and_devices_are_killed_at_random_and_the_tree_goes_on(seed: int) -> None:
    """Every update that was counted is in a model, or was in a gateway that was killed, and is told as lost."""
    chance = random.Random(seed)
    buff, grown = tree(2, 3, 20, 60, last=12)
    counted = updates = killed_sums = 0
    killed: set[str] = set()
    moments = 0
    told: Counter[str] = Counter()
    while not buff.over:
        moments += 1
        assert moments < 2000, "the tree has stalled"
        for _ in range(15):
            gateway = chance.choice(grown.gateways)
            version = gateway.branch.select("any")
            if version is None or chance.random() < 0.1:
                continue  # not wanted now; or the device vanishes with its task
            counted += chance.choice(grown.gateways).branch.add(update(chance.randrange(10_000), version.version)) == (
                "counted"
            )
        if chance.random() < 0.2:
            at = chance.randrange(len(grown.gateways))
            taken = grown.gateways[at].branch.take()
            killed_sums += 0 if taken is None else taken.count
            killed.add(grown.kill(at))
        for step in grown.exchange():
            updates += step.updates
            told.update(step.lost)
        if moments % 50 == 0:  # vanished devices' tasks are given up in time; here time is moved by hand
            for gateway in grown.gateways:
                gateway.branch.permits.expire(1e9)
    assert not buff.refused
    assert updates >= 20 * 11
    assert set(told) <= killed | {gateway.branch.origin for gateway in grown.gateways}
    assert sum(told[origin] for origin in killed) <= killed_sums
    assert counted >= updates
    buff.close()


def test_a_device_of_a_job_that_uses_it_once_counts_once_in_all_versions() -> None:
    """Whatever gateway it reports to, and for whichever version."""
    chosen = EdgeSettings(
        models=ModelManagerConfig(num_updates_for_model=1, global_lr=1.0, max_model_version=9),
        devices=DeviceManagerConfig(device_selection_size=4, device_reuse=False),
    )
    first = SealedMemory.of(encode({"w": (SCHEMA["w"], bytes(16))}))
    buff = FedBuff(SCHEMA, first, chosen, np.random.default_rng(1))
    job = EdgeJob("job-1", "toy", "edge", device_reuse=False)
    grown = EmbeddedTree(buff, job, SCHEMA, depth=1, width=2, clock=lambda: 0.0)
    for moment, gateway in enumerate([*grown.gateways, *grown.gateways]):
        version = gateway.branch.current()[-1].version
        name = contribution_of(job, version, "device-1")
        gateway.branch.add(Update(version, {"w": np.ones(4, np.float32)}, 1.0, name))
        for _ in range(3):
            grown.exchange()
        assert (moment, buff.version) == (moment, 2)
    buff.close()


def test_no_device_moves_the_model_further_than_it_may() -> None:
    bounded = bounds_of(EdgeSettings(max_norm=1.0, max_weight=5.0))
    assert (bounded.max_norm, bounded.max_weight) == (1.0, 5.0)
    private = bounds_of(EdgeSettings(privacy=DevicePrivacy(clip_norm=0.5, noise_multiplier=1.0)))
    assert (private.max_norm, private.max_weight) == (0.5, 1.0)
    with pytest.raises(RecipeUnusable, match="max_norm"):
        EdgeSettings(max_norm=1.0, privacy=DevicePrivacy(clip_norm=0.5, noise_multiplier=1.0))
