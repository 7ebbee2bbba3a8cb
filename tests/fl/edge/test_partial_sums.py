"""Partial sums and branches: whatever the order and the tree, the same sum; each counts once; strict on the wire."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.edge.branch import TreeBranch, norm_of
from fl.edge.contract import EdgeJob, ModelVersion, Update, UpdateBounds, contribution_id
from fl.edge.partial_sum import PartialSum, VersionSum
from fl.errors import MalformedMessage
from fl.tensors import TensorSpec, encode

SCHEMA = {"w": TensorSpec("F32", (2, 3)), "b": TensorSpec("F32", (3,)), "steps": TensorSpec("I64", ())}
ORIGIN = "0" * 32


def version(number: int) -> ModelVersion:
    return ModelVersion(number, "0" * 64, b"x", "1" * 64)


def branch(origin: str = ORIGIN, *, bounds: UpdateBounds | None = None, held: int = 1 << 20) -> TreeBranch:
    job = EdgeJob("job-1", "digits", "edge", bounds=bounds or UpdateBounds())
    made = TreeBranch(job, SCHEMA, origin, lambda: 0.0, held_bytes=held)
    made.advance([version(1), version(2)])
    return made


def update(device: int, number: int = 1, *, weight: float = 1.0, factor: float = 1.0) -> Update:
    generator = np.random.default_rng(device)
    tensors = {
        name: (factor * generator.standard_normal(spec.shape)).astype(np.float32)
        for name, spec in SCHEMA.items()
        if spec.dtype == "F32"
    }
    return Update(number, tensors, weight, contribution_id("job-1", number, f"device-{device}"))


def folded(one: TreeBranch, *updates: Update) -> PartialSum:
    for each in updates:
        assert one.add(each) == "counted"
    one.claims()
    one.settle(())
    partial = one.take()
    assert partial is not None
    return partial


@given(st.lists(st.tuples(st.integers(1, 2), st.floats(0.01, 1e6)), min_size=1, max_size=24), st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_of_arrival_and_shape_of_the_tree_do_not_change_the_sum(
    said: list[tuple[int, float]], chance: random.Random
) -> None:
    updates = [update(device, number, weight=weight) for device, (number, weight) in enumerate(said)]
    expected = folded(branch(), *updates)
    shuffled = chance.sample(updates, len(updates))
    level = []
    while shuffled:
        size = chance.randint(1, len(shuffled))
        level.append(folded(branch(f"{len(level):032x}"), *shuffled[:size]))
        shuffled = shuffled[size:]
    while len(level) > 1:  # a tree of any shape above them
        inner = branch("f" * 32)
        for partial in [level.pop(chance.randrange(len(level))) for _ in range(min(len(level), chance.randint(2, 4)))]:
            raw = partial.encoded()
            inner.merge(PartialSum.decoded(raw, inner.schema, where="test"))
        merged = inner.take()
        assert merged is not None
        level.append(merged)
    (found,) = level
    assert found.count == expected.count == len(updates)
    assert found.versions.keys() == expected.versions.keys()
    for number, one in expected.versions.items():
        other = found.versions[number]
        assert other.ids == one.ids
        assert other.weight == pytest.approx(one.weight, rel=1e-12)
        # The bound that the module states, on the sum of magnitudes: contributions * 2**-53, and twice for both orders.
        of_it = [each for each in updates if each.version == number]
        for name, total in one.sums.items():
            size = sum(np.abs(each.tensors[name].astype(np.float64)) * each.weight for each in of_it)
            assert (np.abs(other.sums[name] - total) <= 4 * len(of_it) * 2.0**-53 * size).all()


def test_a_duplicate_counts_once_at_one_gateway() -> None:
    one = branch()
    assert one.add(update(1)) == "counted"
    assert one.add(update(1)) == "duplicate"
    one.settle(())  # nothing was asked about yet: nothing may be folded
    assert one.take() is None
    one.claims()
    one.settle(())
    assert one.add(update(1, factor=9.0)) == "duplicate"
    partial = one.take()
    assert partial is not None
    np.testing.assert_array_equal(partial.versions[1].sums["b"], update(1).tensors["b"].astype(np.float64))
    assert one.take() is None


def test_what_the_parent_knows_already_is_not_folded() -> None:
    one = branch()
    for device in (1, 2):
        one.add(update(device))
    claims = one.claims()
    assert [len(ids) for ids in claims.values()] == [2]
    one.add(update(3))  # it comes while the parent is asked, and waits for the next time
    one.settle([bytes.fromhex(update(2).contribution)])
    partial = one.take()
    assert partial is not None
    assert partial.versions[1].ids == {bytes.fromhex(update(1).contribution)}
    assert one.claims() == {1: [bytes.fromhex(update(3).contribution)]}


def test_what_is_not_of_the_model_or_not_finite_is_refused() -> None:
    one = branch()
    good = update(1)
    for tensors in (
        {"w": good.tensors["w"]},
        {**good.tensors, "more": good.tensors["b"]},
        {**good.tensors, "b": good.tensors["w"]},
        {**good.tensors, "b": np.array([0, 1, 2])},
        {**good.tensors, "b": np.array([0, np.nan, 2], np.float32)},
        {**good.tensors, "b": np.array([0, -np.inf, 2], np.float32)},
        {**good.tensors, "b": np.array([0, 1e300, 2])},
        {**good.tensors, "b": np.array([0, 1e25, 2], np.float32)},
    ):
        outcome = one.add(Update(1, tensors, 1.0, good.contribution))
        assert outcome.startswith("refused: ")
    assert one.add(update(1, number=3)) == "stale"
    assert one.add(good) == "counted"
    for wrong in ({"weight": 0.0}, {"weight": float("nan")}, {"weight": float("inf")}, {"contribution": "x" * 64}):
        changed = Update(**{"version": 1, "tensors": good.tensors, "weight": 1.0, "contribution": "0" * 64, **wrong})  # type: ignore[arg-type]
        assert one.add(changed).startswith("refused: ")


def test_no_device_contributes_more_than_its_bounds() -> None:
    one = branch(bounds=UpdateBounds(max_norm=2.0, max_weight=3.0))
    partial = folded(one, update(1, factor=1e6, weight=1e9))
    sums = partial.versions[1]
    assert sums.weight == 3.0
    assert norm_of(sums.sums) == pytest.approx(2.0 * 3.0, rel=1e-6)


def test_what_waits_is_bounded_and_goes_on_when_there_is_room() -> None:
    one = branch(held=100)  # an update has 36 bytes
    assert [one.add(update(device)) for device in range(3)] == ["counted", "counted", "busy"]
    one.claims()
    one.settle(())
    assert one.add(update(2)) == "counted"


def test_a_version_that_is_over_takes_what_waited_with_it_and_says_so() -> None:
    one = branch()
    folded_one, held = update(1), update(2)
    one.add(folded_one)
    one.claims()
    one.settle(())
    one.add(held)
    one.advance([version(2), version(3)])
    assert one.dropped == 2
    assert one.take() is None
    assert one.claims() == {}
    one.merge(PartialSum(ORIGIN, 0, {1: VersionSum(one.schema)}))
    assert one.take() is None
    assert one.add(update(1, number=1)) == "stale"
    assert one.current()[-1].version == 3


# --- on the wire ------------------------------------------------------------------------------------------------------


def wire(head: object, tensors: dict[str, tuple[TensorSpec, bytes]]) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack(">I", len(text)) + text + encode(tensors)


def parts() -> tuple[dict[str, object], dict[str, tuple[TensorSpec, bytes]]]:
    head: dict[str, object] = {
        "origin": ORIGIN,
        "sequence": 0,
        "versions": [{"version": 1, "count": 2, "weight": 2.5}],
    }
    tensors = {
        "1/w": (TensorSpec("F64", (2, 3)), bytes(48)),
        "1/b": (TensorSpec("F64", (3,)), bytes(24)),
        "1#": (TensorSpec("U8", (2, 32)), bytes(32) + b"\1" * 32),
    }
    return head, tensors


def test_a_partial_sum_survives_the_wire() -> None:
    partial = folded(branch(), update(1), update(2, 2, weight=3), update(3, 2))
    found = PartialSum.decoded(partial.encoded(), branch().schema, where="test")
    assert (found.origin, found.sequence, found.count) == (partial.origin, partial.sequence, 3)
    for number, one in partial.versions.items():
        assert found.versions[number].ids == one.ids
        for name, total in one.sums.items():
            np.testing.assert_array_equal(found.versions[number].sums[name], total)
    PartialSum.decoded(wire(*parts()), branch().schema, where="test")


@pytest.mark.parametrize(
    ("head", "tensors"),
    [
        ({"more": 1}, {}),
        ({"origin": "x"}, {}),
        ({"sequence": -1}, {}),
        ({"sequence": True}, {}),
        ({"versions": []}, {}),
        ({"versions": [{"version": 1, "count": 2, "weight": 2.5}] * 2}, {}),
        ({"versions": [{"version": 1, "count": 2, "weight": float("inf")}]}, {}),
        ({"versions": [{"version": 1, "count": 2, "weight": -1.0}]}, {}),
        ({"versions": [{"version": 1, "count": 2, "weight": 1e12}]}, {}),
        ({"versions": [{"version": 1, "count": 1 << 40, "weight": 1.0}]}, {}),
        ({"versions": [{"version": 1, "count": 3, "weight": 1.0}]}, {}),
        ({}, {"1/steps": (TensorSpec("F64", ()), bytes(8))}),
        ({}, {"1/b": (TensorSpec("F32", (3,)), bytes(12))}),
        ({}, {"1/b": (TensorSpec("F64", (3,)), struct.pack("<3d", 0, float("nan"), 0))}),
        ({}, {"1#": (TensorSpec("U8", (2, 32)), bytes(64))}),
        ({}, {"1#": (TensorSpec("U8", (2, 32)), b"\1" * 32 + bytes(32))}),
    ],
)
def test_a_malformed_partial_sum_is_refused(
    head: dict[str, object], tensors: dict[str, tuple[TensorSpec, bytes]]
) -> None:
    own_head, own_tensors = parts()
    with pytest.raises(MalformedMessage, match="partial sum"):
        PartialSum.decoded(wire(own_head | head, own_tensors | tensors), branch().schema, where="test")


@given(st.binary(max_size=40), st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_no_bytes_are_more_than_refused(more: bytes, at: int, value: int) -> None:
    raw = bytearray(wire(*parts()))
    raw[at % len(raw)] = value
    for outside in (bytes(raw), more, bytes(raw) + more, bytes(raw[: at % len(raw)])):
        try:
            found = PartialSum.decoded(outside, branch().schema, where="test")
        except MalformedMessage:
            continue
        assert all(np.isfinite(total).all() for one in found.versions.values() for total in one.sums.values())
