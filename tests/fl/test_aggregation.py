"""The weighted mean against a plain reference, and the gate that updates pass before it."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import UpdateRefused
from fl.guard.gate import admit_update, max_update_size
from fl.model import ParamsType, params_of, schema_of, tensors_of
from fl.tensors import BLOCK, TensorFile, encode, parse
from fl.transport.chunks import Assembly, serve_chunks
from fl.transport.memory import OpenMemory, SealedMemory


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


def opened(raw: bytes) -> OpenMemory:
    """Bytes as an update that came in."""
    with Assembly(len(raw), where="test") as assembly:
        assembly.take(serve_chunks(raw))
        return assembly.leave_open()  # type: ignore[return-value]  # no spool was given


def halved(_name: str, _start: int, current: Any, difference: Any) -> Any:
    return current + difference / 2


@given(
    shapes=st.lists(st.sampled_from([(), (1,), (7,), (3, 5), (BLOCK + 9,)]), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(["<f4", "<f8", "<f2", "<i4"]), min_size=4, max_size=4),
    kind=st.sampled_from(["FULL", "DIFF"]),
    weights=st.lists(st.floats(0.5, 100), min_size=1, max_size=4),
    step=st.sampled_from([None, halved]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_what_is_summed_in_place_is_what_is_summed_beside(
    shapes: list[Any], dtypes: list[str], kind: str, weights: list[float], step: Any, seed: int
) -> None:
    random = np.random.default_rng(seed)

    def made() -> dict[str, Any]:
        return {
            f"t{number}": (random.normal(size=shape) * 3).astype(dtype)
            for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
        }

    model, updates = made(), [encode(tensors_of(made())) for _ in weights]
    schema = schema_of(tensors_of(model))
    beside, place = (WeightedMean(schema, ParamsType(kind)) for _ in range(2))
    for _ in range(2):  # the second round begins anew, in other memory
        for raw, weight in zip(updates, weights, strict=True):
            beside.fold(parse(raw, max_size=len(raw)), weight)
            memory = opened(raw)
            tensors = memory.tensors()
            place.fold(tensors, weight, memory=memory)
            tensors.release()
            memory.close()
        with beside.result(file_of(model), step) as wanted, place.result(file_of(model), step) as found:
            assert bytes(found.view) == bytes(wanted.view)
            assert found.digest == wanted.digest == hashlib.sha256(wanted.view).hexdigest()
            own = {"<f4", "<f8"} >= {dtype for dtype, _ in zip(dtypes, shapes, strict=False)}
            assert isinstance(found, OpenMemory) == own, "what has other numbers than its sums is not summed in place"


def test_an_update_is_changed_only_where_it_may_be_and_is_laid_out_as_a_model() -> None:
    tensors = tensors_of({"a": np.ones(4, dtype=np.float32), "b": np.ones(2, dtype=np.float32)})
    schema = schema_of(tensors)
    raw = encode(tensors)
    # the header of another writer, one byte longer
    padded = struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] + 1) + raw[8:].replace(b"}}", b"}} ", 1)
    for memory in (SealedMemory.of(raw), opened(padded)):
        mean = WeightedMean(schema, ParamsType.FULL)
        before = bytes(memory.view)
        update = memory.tensors()
        mean.fold(update, 3.0, memory=memory)
        assert bytes(memory.view) == before
        with mean.result(update) as result:
            assert bytes(result.view) == raw
        update.release()
        memory.close()


def test_sums_in_place_give_the_room_of_an_update_back_once_and_end_with_the_mean() -> None:
    raw = encode(tensors_of({"w": np.ones(4, dtype=np.float32)}))
    given_back: list[str] = []
    memory = opened(raw)
    memory.on_close = lambda: given_back.append("room")
    mean = WeightedMean(schema_of(tensors_of({"w": np.ones(4, dtype=np.float32)})), ParamsType.FULL)
    mean.fold(memory.tensors(), 1.0, memory=memory)
    memory.close()
    assert given_back == ["room"]
    with pytest.raises(ValueError, match="closed"):
        _ = memory.view
    mean.close()
    with pytest.raises(ValueError, match="no update"):
        mean.result(file_of({"w": np.ones(4, dtype=np.float32)}))
