"""Vectors of safetensors files and of the forms in which differences travel."""

from __future__ import annotations

import json
import struct
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from fl.edge.deltas import encode_delta
from fl.edge.messages import Encoding
from fl.errors import MalformedTensors
from fl.tensors import FLOATS, TensorSpec, encode, parse, widen_bf16

_DRAWS = 20261


def _bits(array: npt.NDArray[Any]) -> str:
    """The numbers as little-endian float32 in hex."""
    return np.ascontiguousarray(array, dtype="<f4").tobytes().hex()


def safetensors() -> dict[str, Any]:
    """Files that hold tensors, with the values of those of floats, and files that hold none."""
    mixed = {
        "a": (TensorSpec("F32", (2, 3)), np.arange(6, dtype="<f4").tobytes()),
        "half": (TensorSpec("F16", (5,)), np.array([0, 1.5, -2, 6e-8, 65504], "<f2").tobytes()),
        "b.bf": (TensorSpec("BF16", (2,)), bytes.fromhex("803f20c1")),
        "d": (TensorSpec("F64", ()), np.float64(0.1).tobytes()),
        "count": (TensorSpec("I64", (1,)), bytes(8)),
        "none": (TensorSpec("F32", (0, 4)), b""),
    }
    whole = encode(mixed)
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    files = [
        whole,
        encode({}),
        whole[:-1],
        whole + b"\0",
        whole[:7],
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        _file('{"a":1}', 0),
        _file(json.dumps({"a": one, "__metadata__": {"k": "v"}}), 4),
        _file(json.dumps({"a": one, "__metadata__": {"k": 1}}), 4),
        _file('{"a":' + json.dumps(one) + ',"a":' + json.dumps(one) + "}", 4),
        _file(" {}", 0),
        _file("[]", 0),
        _file(json.dumps({"a": one, "b": one}), 4),
        _file(json.dumps({"a": {**one, "data_offsets": [4, 8]}}), 8),
        _file(json.dumps({"a": {**one, "shape": [2]}}), 4),
        _file(json.dumps({"a": {**one, "shape": [-1]}}), 4),
        _file(json.dumps({"a": {**one, "shape": [1 << 47, 1 << 47]}}), 4),
        _file(json.dumps({"a": {**one, "shape": [1] * 17}}), 4),
        _file(json.dumps({"a": {**one, "shape": [1.0]}}), 4),
        _file(json.dumps({"a": {**one, "dtype": "F8"}}), 4),
        _file(json.dumps({"a": {**one, "more": 1}}), 4),
        _file(json.dumps({"": one}), 4),
        _file(json.dumps({"a\u0001": one}), 4),
    ]
    return {"files": [{"raw": raw.hex(), "floats": _floats(raw)} for raw in files]}


def _file(header: str, size: int) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _floats(raw: bytes) -> dict[str, Any] | None:
    try:
        file = parse(raw, max_size=len(raw), where="vector")
    except MalformedTensors:
        return None
    found = {}
    for name, spec in file.schema.items():
        if spec.dtype in FLOATS:
            array = file.array(name)
            array = widen_bf16(array) if spec.dtype == "BF16" else array.astype(np.float32)
            found[name] = {"shape": list(spec.shape), "values": _bits(array)}
    return found


def deltas() -> dict[str, Any]:
    """One difference, and its bytes in each encoding, with the random numbers by which `int8` rounds."""
    numbers = np.random.default_rng(7)
    tensors = {  # in the order of their names
        "net.bias": np.array([1.0, -0.0, 3.4e38, 1e-45, 0.1, 1 / 3], np.float32),
        "net.weight": numbers.normal(size=(5, 7)).astype(np.float32),
        "tie": np.array([0x3F808000, 0x3F818000, 0x3F80FFFF], np.uint32).view(np.float32),
        "zero": np.zeros((2, 2), np.float32),
    }
    draws = np.random.default_rng(_DRAWS)
    return {
        "tensors": [
            {"name": name, "shape": list(array.shape), "values": _bits(array)} for name, array in tensors.items()
        ],
        "draws": _bits(np.concatenate([draws.random(a.shape, dtype=np.float32).ravel() for a in tensors.values()])),
        "encoded": {
            encoding: encode_delta(tensors, encoding, np.random.default_rng(_DRAWS), compressed=False).hex()
            for encoding in get_args(Encoding)
        },
    }
