"""The weighted mean against a plain reference, and the gate that updates pass before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import UpdateRefused
from fl.guard.gate import admit_update, max_update_size
from fl.model import ParamsType, params_of, schema_of, tensors_of
from fl.tensors import BLOCK, TensorFile, encode, parse


def file_of(params: dict[str, Any]) -> TensorFile:
    return parse(encode(tensors_of(params)), max_size=1 << 30)


def aggregate(updates: list[dict[str, Any]], weights: list[float], model: dict[str, Any], kind: str) -> dict[str, Any]:
    mean = WeightedMean(schema_of(tensors_of(model)), ParamsType(kind))
    for update, weight in zip(updates, weights, strict=True):
        mean.fold(file_of(update), weight)
    with mean.result(file_of(model)) as result:
        read = params_of(parse(result.view, max_size=result.size), "numpy")
        return {name: array.copy() for name, array in read.items()}


def test_the_mean_is_the_papers_over_blocks_and_dtypes() -> None:
    random = np.random.default_rng(1)
    shapes = {"small": (3,), "scalar": (), "large": (BLOCK + 17,)}
    updates = [{name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(3)]
    weights = [10.0, 1.0, 32.5]
    result = aggregate(updates, weights, updates[0], "FULL")
    for name in shapes:
        wanted = sum(w * u[name].astype(np.float64) for w, u in zip(weights, updates, strict=True)) / sum(weights)
        np.testing.assert_allclose(result[name], wanted, rtol=1e-5, atol=1e-6)
        assert result[name].dtype == np.float32


def test_a_mean_begins_anew_after_its_result() -> None:
    model = {"w": np.zeros(2, dtype=np.float32), "n": np.zeros(1, dtype=np.int64)}
    mean = WeightedMean(schema_of(tensors_of(model)), ParamsType.FULL)
    for value in (4.0, 7.0):
        mean.fold(file_of({"w": np.full(2, value, dtype=np.float32), "n": np.full(1, 3)}), 2.0)
        with mean.result(file_of(model)) as result:
            read = params_of(parse(result.view, max_size=result.size), "numpy")
            assert read["w"].tolist() == [value, value]
            assert read["n"].tolist() == [3]
            del read
    with pytest.raises(ValueError, match="no update"):
        mean.result(file_of(model))


def test_differences_are_added_to_the_model() -> None:
    model = {"w": np.array([1.0, 2.0], dtype=np.float32)}
    deltas = [{"w": np.array([1.0, 0.0], dtype=np.float32)}, {"w": np.array([0.0, 4.0], dtype=np.float32)}]
    np.testing.assert_allclose(aggregate(deltas, [1, 3], model, "DIFF")["w"], [1.25, 5.0])


def test_two_updates_give_the_same_bits_in_either_order() -> None:
    random = np.random.default_rng(2)
    updates = [{"w": random.normal(size=1000).astype(np.float32)} for _ in range(2)]
    one = aggregate(updates, [3, 7], updates[0], "FULL")
    other = aggregate(updates[::-1], [7, 3], updates[0], "FULL")
    assert one["w"].tobytes() == other["w"].tobytes()


def test_integers_are_rounded_and_booleans_follow_the_majority() -> None:
    updates = [
        {"n": np.array([1, 2], dtype=np.int64), "b": np.array([True, False]), "u": np.array([255], dtype=np.uint8)},
        {"n": np.array([2, 2], dtype=np.int64), "b": np.array([False, False]), "u": np.array([255], dtype=np.uint8)},
    ]
    result = aggregate(updates, [1, 3], updates[0], "FULL")
    np.testing.assert_array_equal(result["n"], [2, 2])
    np.testing.assert_array_equal(result["b"], [False, False])
    np.testing.assert_array_equal(result["u"], [255])


def test_bf16_is_averaged_in_float32() -> None:
    updates = [
        {"w": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)},
        {"w": torch.tensor([2.0, 3.0], dtype=torch.bfloat16)},
    ]
    np.testing.assert_array_equal(aggregate(updates, [1, 1], updates[0], "FULL")["w"], [1.5, 3.0])


MODEL = {"w": np.zeros((2, 2), dtype=np.float32), "n": np.zeros(1, dtype=np.int64), "b": np.array([False])}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w": None}, "'w' is missing"),
        ({"x": np.zeros(1, dtype=np.float32)}, "'x' is not in the model"),
        ({"w": np.zeros((4,), dtype=np.float32)}, r"F32 \[4\], not the model's F32 \[2, 2\]"),
        ({"w": np.zeros((2, 2), dtype=np.float64)}, r"F64 \[2, 2\], not the model's F32"),
        ({"w": np.array([[0, 0], [0, np.nan]], dtype=np.float32)}, "holds a NaN"),
        ({"w": np.array([[0, np.inf], [0, 0]], dtype=np.float32)}, "holds an infinity"),
        ({"w": np.array([[0, -1e30], [0, 0]], dtype=np.float32)}, "magnitude 1e\\+30"),
        ({"b": np.array([7], dtype=np.uint8).view(np.bool_)}, "neither 0 nor 1"),
    ],
)
def test_an_update_that_is_not_the_models_is_refused(change: dict[str, Any], reason: str) -> None:
    params = {name: array for name, array in {**MODEL, **change}.items() if array is not None}
    with pytest.raises(UpdateRefused, match=reason):
        admit_update(encode(tensors_of(params)), schema_of(tensors_of(MODEL)), site="cygnus-bio")


def test_every_reason_is_given() -> None:
    params = {"x": np.zeros(1, dtype=np.float32), "w": np.full((2, 2), np.nan, dtype=np.float32)}
    with pytest.raises(UpdateRefused) as refusal:
        admit_update(encode(tensors_of(params)), schema_of(tensors_of(MODEL)), site="cygnus-bio")
    assert len(refusal.value.reasons) == 4


def test_a_late_nan_in_a_second_block_is_seen() -> None:
    params = {"w": np.zeros(BLOCK + 5, dtype=np.float32)}
    schema = schema_of(tensors_of(params))
    params["w"][-1] = np.nan
    with pytest.raises(UpdateRefused, match="NaN"):
        admit_update(encode(tensors_of(params)), schema, site="cygnus-bio")


def test_the_size_bound_holds_any_writers_file_but_not_twice_the_model() -> None:
    schema = schema_of(tensors_of(MODEL))
    import safetensors.numpy

    admit_update(safetensors.numpy.save(MODEL), schema, site="cygnus-bio")
    with pytest.raises(UpdateRefused, match="more than the"):
        admit_update(b"\0" * (max_update_size(schema) + 1), schema, site="cygnus-bio")
