"""The pure part of the export gate: what numbers become, what has one size, and the floor of statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fl.errors import OutputRefused
from fl.guard.disclosure import disclose
from fl.jobs.outputs import EXPONENTS, Outputs, number_bits, rounded
from fl.jobs.settings import JobSettings
from fl.model import tensors_of
from fl.tensors import encode, parse
from fl.transport.memory import SealedMemory
from policies.budgets import MAX_AMOUNT, Amount, Balance, Export, debit
from policies.documents import Allowance

FLOATS = st.floats(-1e12, 1e12, exclude_min=True, exclude_max=True)


@given(FLOATS, st.integers(1, 9))
def test_a_rounded_number_is_one_of_those_that_are_counted(value: float, digits: int) -> None:
    found = rounded(value, digits)
    assert rounded(found, digits) == found
    assert found == 0 or abs(found - value) <= abs(value) * 10.0 ** (1 - digits)
    if found:
        mantissa, _, exponent = f"{found:.{digits - 1}e}".partition("e")
        assert float(f"{mantissa}e{exponent}") == found
        assert int(exponent) in EXPONENTS


def test_all_numbers_of_one_digit_are_as_many_as_are_counted() -> None:
    """Every representable number is reached, and none beside: the capacity is the logarithm of their number."""
    reached = {
        rounded(sign * lead * 10.0**exponent, 1) for sign in (-1, 1) for lead in range(1, 10) for exponent in EXPONENTS
    } | {rounded(0.0, 1), rounded(1e-13, 1), rounded(-0.0, 1)}
    assert len(reached) == 2 * 9 * len(EXPONENTS) + 1
    assert number_bits(1) == math.ceil(math.log2(len(reached)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e13, 9.9999999e12])
def test_what_cannot_be_counted_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not"):
        rounded(value, 6)


def settings_of(**changes: Any) -> JobSettings:
    return JobSettings.model_validate(
        {
            "name": "x", "recipe": "fedavg", "num_rounds": 2, "min_clients": 1, "train_script": "x.py",
            "framework": "numpy", "model": {"w": {"dtype": "F32", "shape": (4,)}}, **changes,
        }
    )  # fmt: skip


def shown(values: Any, settings_: JobSettings, **changes: Any) -> Any:
    raw = encode(tensors_of({"w": np.asarray(values, dtype=np.float32)}))
    arguments: dict[str, Any] = {"params_type": "FULL", "weight": 1.0, "metrics": {}, "site": "s", **changes}
    with SealedMemory.of(raw) as update, SealedMemory.of(encode(tensors_of({"w": np.ones(4, np.float32)}))) as model:
        found = disclose(update, model=model, settings=settings_, **arguments)
    with found.memory:
        return parse(bytes(found.memory.view), max_size=1 << 16).array("w"), found.memory.size


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), st.integers(2, 8))
def test_quantised_numbers_are_steps_and_the_size_is_one(values: list[float], bits: int) -> None:
    outputs = {"bits": bits, "limit": 2.0}
    found, size = shown(values, settings_of(outputs=outputs))
    steps = (found.astype(np.float64) - 1) * ((1 << (bits - 1)) - 1) / 2.0
    assert np.abs(steps - np.rint(steps)).max() < 1e-4
    assert np.abs(found - 1).max() <= 2.0 + 1e-6
    assert size == shown([0, 0, 0, 0], settings_of(outputs=outputs))[1]


def test_the_order_is_clip_then_noise_then_quantise() -> None:
    """Noise goes beyond the clipped norm, and what leaves is on the steps in spite of it."""
    outputs = {"clip_norm": 1e-3, "noise_multiplier": 1000.0, "bits": 6, "limit": 8.0}
    found, _ = shown([5, 5, 5, 5], settings_of(outputs=outputs), random=lambda size: bytes(size))
    steps = (found.astype(np.float64) - 1) * 31 / 8.0
    assert np.abs(steps - np.rint(steps)).max() < 1e-4
    assert np.linalg.norm(found - 1) > 1e-3


STATISTICS = {"recipe": "fedstats", "options": {"recipe": "fedstats", "features": ("age",), "min_count": 5}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"count": [4]}, "count tells of fewer than 5"),
        ({"histogram": [[12, 1, 7]]}, "histogram tells of fewer than 5"),
        ({"histogram": [[10, 0, 8]]}, "leaves out fewer than 5"),
        ({"histogram": [[10, 0, 20]]}, "more records than its count"),
        ({"count": [20.5]}, "no count"),
        ({"count": [0], "histogram": [[0, 0, 0]]}, "of which it counts nothing"),
        ({"mean": [3.5]}, "only the server tells"),
        ({"edges": [[1, 2, 3, 4]]}, "only the server tells"),
    ],
)
def test_the_floor_of_statistics_holds_for_any_script(change: dict[str, Any], words: str | None) -> None:
    plain = {"count": [20], "sum": [100], "squares": [5], "mean": [0], "histogram": [[10, 0, 10]], "edges": [[0] * 4]}
    tensors = {name: np.array(change.get(name, value), dtype=np.float64) for name, value in plain.items()}
    model = {name: {"dtype": "F64", "shape": value.shape} for name, value in tensors.items()}
    raw = encode(tensors_of(tensors))
    with SealedMemory.of(raw) as update, SealedMemory.of(raw) as current:
        arguments: dict[str, Any] = {"params_type": "FULL", "weight": 1.0, "metrics": {}, "site": "s"}
        job = settings_of(model=model, **STATISTICS)
        if words is None:
            disclose(update, model=current, settings=job, **arguments).memory.close()
            with pytest.raises(OutputRefused, match="its weight is not 1"):
                disclose(update, model=current, settings=job, **{**arguments, "weight": 2.0})
            return
        with pytest.raises(OutputRefused) as refusal:
            disclose(update, model=current, settings=job, **arguments)
        assert words in "; ".join(refusal.value.reasons)
        assert words not in refusal.value.what


AMOUNTS = st.builds(
    Amount,
    bits=st.integers(0, 2000),
    micro_epsilon=st.integers(0, 2_000_000),
    pico_delta=st.integers(0, 2000),
)


@given(st.lists(AMOUNTS, max_size=20), st.integers(0, 3000), st.integers(0, 3))
def test_no_sequence_of_debits_passes_its_limits(amounts: list[Amount], bits: int, epsilon: int) -> None:
    own, approved = Allowance(bits=bits), Allowance(epsilon=float(epsilon))
    balance, debited = Balance(Amount(), Amount()), Amount()
    for amount in amounts:
        export = Export(job="j", bundle="a" * 64, round=0, recipient="server/hub", amount=amount)
        after, reasons = debit(export, balance, "m", own, approved)
        if reasons:
            assert after == balance
            assert all("is spent" in reason for reason in reasons)
        else:
            debited += amount
        balance = after
    assert balance.owner == balance.bundle == debited
    assert debited.bits <= bits
    assert debited.micro_epsilon <= epsilon * 1_000_000


def test_sums_stay_countable() -> None:
    full = Balance(Amount(bits=MAX_AMOUNT), Amount())
    export = Export(job="j", bundle="a" * 64, round=0, recipient="server/hub", amount=Amount(bits=1))
    assert debit(export, full, "m", None, None)[1]


def test_outputs_that_contradict_themselves_are_refused() -> None:
    for wrong in ({"noise_multiplier": 1.0}, {"bits": 4}, {"limit": 1.0}, {"metrics": ("a", "a")}, {"digits": 0}):
        with pytest.raises(ValidationError):
            Outputs.model_validate(wrong)
