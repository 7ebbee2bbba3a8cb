"""The safetensors codec: what it writes others read, what it reads is strict, hostile files are refused cheaply."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.errors import MalformedTensors, RecipeUnusable
from fl.model import check_metrics, check_weight, params_of, tensors_of
from fl.tensors import encode, layout, narrow_bf16, parse, widen_bf16


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_we_write_the_library_reads_and_the_other_way_round() -> None:
    arrays = {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "scalar": np.array(5, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.float64),
        "flags": np.array([True, False]),
        "half": np.array([1.5, -2], dtype=np.float16),
    }
    ours = encode(tensors_of(arrays))
    theirs = safetensors.numpy.load(ours)
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(theirs[name], array)
    back = params_of(parse(safetensors.numpy.save(arrays), max_size=1 << 20), "numpy")
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_torch_tensors_of_every_dtype_survive_the_trip_bit_for_bit() -> None:
    tensors = {
        str(dtype): torch.tensor([[0, 1], [1, 0]], dtype=dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool,
        )
    }  # fmt: skip
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    tensors["scalar"] = torch.tensor(3)
    raw = encode(tensors_of(tensors))
    read = params_of(parse(bytearray(raw), max_size=1 << 20), "pytorch")
    theirs = safetensors.torch.load(raw)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert torch.equal(theirs[name], tensor)


def test_equal_tensors_have_equal_bytes_whatever_their_order() -> None:
    a, b = np.ones(3, dtype=np.float32), np.zeros(2, dtype=np.float64)
    assert encode(tensors_of({"a": a, "b": b})) == encode(tensors_of({"b": b, "a": a}))


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "ends before"),
        (b"\0" * 7, "ends before"),
        (struct.pack("<Q", 1 << 63), "header says"),
        (struct.pack("<Q", 100) + b"{}", "header says"),
        (raw_file(b"[]"), "does not begin"),
        (raw_file(b'{"a":'), "not JSON"),
        (raw_file(b"{" + b'"a":{' * 20000), "not JSON"),
        (raw_file(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":1}', b"1234"), "twice"),
        (raw_file({"a": entry("F32", [1], 0, 4)}), "0 bytes follow|bytes follow"),
        (raw_file({"a": entry("F32", [1], 0, 4)}, b"12345"), "1 bytes follow"),
        (raw_file({"a": entry("F32", [2], 0, 4)}, b"1234"), "range of 4 bytes for a shape of 8"),
        (raw_file({"a": entry("F32", [1 << 40, 1 << 40, 1 << 40], 0, 4)}, b"1234"), "range of"),
        (raw_file({"a": entry("F32", [-1], 0, 4)}, b"1234"), "shape that is none"),
        (raw_file({"a": entry("F32", [1.0], 0, 4)}, b"1234"), "shape that is none"),  # type: ignore[list-item]  # hostile
        (raw_file({"a": entry("F32", [True], 0, 4)}, b"1234"), "shape that is none"),
        (raw_file({"a": entry("F32", [1] * 17, 0, 4)}, b"1234"), "shape that is none"),
        (raw_file({"a": entry("F8_E4M3", [4], 0, 4)}, b"1234"), "dtype that may not travel"),
        (raw_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"), "overlap"),
        (raw_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"123456789abc"), "leave a hole"),
        (raw_file({"a": entry("F32", [1], 4, 8)}, b"12345678"), "begins at 4"),
        (raw_file({"a": entry("F32", [0], 4, 0)}, b"1234"), "range of -4"),
        (raw_file({"a": {**entry("F32", [1], 0, 4), "code": "x"}}, b"1234"), "not exactly"),
        (raw_file({"": entry("F32", [1], 0, 4)}, b"1234"), "name has 0"),
        (raw_file({"\x1b[2J": entry("F32", [1], 0, 4)}, b"1234"), "unprintable"),
        (raw_file({"__metadata__": {"a": 1}}), "not a map of strings"),
    ],
)
def test_malformed_files_are_refused_with_their_reason(raw: bytes, complaint: str) -> None:
    with pytest.raises(MalformedTensors, match=complaint):
        parse(raw, max_size=1 << 20)


def test_a_file_over_its_bound_is_refused_before_it_is_read() -> None:
    raw = encode(tensors_of({"a": np.zeros(100, dtype=np.float32)}))
    with pytest.raises(MalformedTensors, match="more than the 100"):
        parse(raw, max_size=100)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_header_never_gives_bytes_outside_the_file(data: st.DataObject) -> None:
    raw = bytearray(encode(tensors_of({"a": np.arange(6, dtype=np.float32), "b": np.arange(3, dtype=np.int16)})))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = parse(bytes(raw), max_size=1 << 16)
    except MalformedTensors:
        return
    assert sum(len(file.bytes_of(name)) for name in file.schema) <= len(raw)
    for name in file.schema:
        assert len(file.bytes_of(name)) == file.schema[name].size


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(raw: bytes) -> None:
    with pytest.raises(MalformedTensors):
        parse(raw, max_size=1 << 16)


def test_bf16_rounds_to_nearest_even_as_torch_does() -> None:
    values = np.concatenate([np.linspace(-3, 3, 1001), [1e-30, 1e30, 0.0, -0.0]]).astype(np.float32)
    ours = narrow_bf16(values)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(widen_bf16(ours), torch.from_numpy(values).to(torch.bfloat16).float().numpy())


def test_what_may_not_travel_is_named() -> None:
    with pytest.raises(RecipeUnusable, match="'a' has dtype object"):
        tensors_of({"a": np.array([object()])})
    with pytest.raises(RecipeUnusable, match=r"'a' is torch\.complex64"):
        tensors_of({"a": torch.zeros(2, dtype=torch.complex64)})


def test_metrics_and_weight_are_finite_numbers_of_plain_names() -> None:
    assert check_metrics({"a": np.float32(1), "b": torch.tensor(2.0), "c": True}) == {"a": 1.0, "b": 2.0, "c": 1.0}
    for bad in (
        {"a": float("nan")},
        {"a": "1"},
        {"": 1},
        {"a\n": 1},
        {str(i): 1 for i in range(65)},
        {"a": torch.ones(2)},
    ):
        with pytest.raises(MalformedTensors):
            check_metrics(bad)
    assert check_weight({}) == 1.0
    assert check_weight({"NUM_STEPS_CURRENT_ROUND": 12}) == 12.0
    for weight in (0, -1, float("nan"), float("inf"), 2**31 + 1, "3"):
        with pytest.raises(MalformedTensors):
            check_weight({"NUM_STEPS_CURRENT_ROUND": weight})


def test_the_layout_aligns_every_tensor() -> None:
    specs = {name: spec for name, (spec, _) in tensors_of(
        {"a": np.zeros(3, np.int8), "b": np.zeros(3, np.float64), "c": np.zeros(3, np.float16)}
    ).items()}  # fmt: skip
    _, offsets, _ = layout(specs)
    assert offsets["b"] % 8 == 0
    assert offsets["c"] % 2 == 0
