"""Differences in two bytes or one for a number: what comes back, what is owed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from federation_world import SITES, found_federation, make_job
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv
from fl.aggregation.deltas import SCALE, STEPS, Delta, ErrorFeedback, encoded_schema
from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import RecipeUnusable, UpdateRefused
from fl.guard.gate import admit_update, max_update_size
from fl.jobs.bundle import Bundle
from fl.jobs.outputs import tensor_bits
from fl.model import ParamsType, schema_of, tensors_of
from fl.tensors import BLOCK, TensorSpec, encode
from fl.transport.memory import SealedMemory

DELTAS: tuple[Delta, ...] = ("bf16", "int8")
BOUND = {"bf16": 2.0**-8, "int8": 0.51 / STEPS}
"""Of one number's error: a part of the number with bf16, of the largest number with int8."""
TRAIN = """
import numpy as np
from fl import client as flare

flare.init()
site = flare.get_site_name()
rng = np.random.default_rng(len(site))
while flare.is_running():
    received = flare.receive()
    step = np.float32(0.001) * np.arange(received.params["w"].size, dtype=np.float32)
    flare.send(flare.FLModel(params={"w": received.params["w"] + step}))
"""

floats = arrays.arrays(
    np.float32, st.integers(0, 40), elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=True)
)


def sealed(params: dict[str, npt.NDArray[Any]]) -> SealedMemory:
    return SealedMemory.of(encode(tensors_of(params)))


def through(feedback: ErrorFeedback, delta: Delta, params: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """What a server gets of a difference."""
    schema = schema_of(tensors_of(params))
    with sealed(params) as difference, feedback.encoded(difference) as encoded:
        assert encoded.size <= max_update_size(encoded_schema(schema, delta))
        update = admit_update(encoded.source, schema, site="a", delta=delta)
        assert update.schema == schema
        return {name: np.array(update.array(name)) for name in schema}


@pytest.mark.parametrize("delta", DELTAS)
@given(values=floats)
def test_a_number_comes_back_within_its_bound(delta: Delta, values: npt.NDArray[np.float32]) -> None:
    params = {"w": values, "second": np.ones((2, 3), dtype=np.float32)}
    found = through(ErrorFeedback(schema_of(tensors_of(params)), delta), delta, params)
    largest = np.abs(values).max(initial=0)
    allowed = BOUND[delta] * (np.abs(values) if delta == "bf16" else largest) + 1e-38 * STEPS
    assert (np.abs(found["w"] - values) <= allowed).all()
    assert np.abs(found["second"] - 1).max() <= BOUND[delta]


@pytest.mark.parametrize("delta", DELTAS)
@given(rounds=st.lists(arrays.arrays(np.float64, 5, elements=st.floats(-100, 100)), min_size=1, max_size=12))
def test_over_the_rounds_only_the_last_rounding_is_missing(delta: Delta, rounds: list[npt.NDArray[np.float64]]) -> None:
    feedback = ErrorFeedback({"w": TensorSpec("F64", (5,))}, delta)
    received = sum(through(feedback, delta, {"w": values})["w"].astype(np.float64) for values in rounds)
    owed = feedback._owed["w"]
    assert np.allclose(received + owed, sum(rounds), rtol=1e-6, atol=1e-6)
    assert np.abs(owed).max() <= 1.01 * BOUND[delta] * 102


def test_what_is_far_smaller_than_the_rest_arrives_in_time() -> None:
    """Without feedback an eight-bit code would lose it in every round."""
    feedback = ErrorFeedback({"w": TensorSpec("F32", (2,))}, "int8")
    step = np.array([1.0, 0.001], dtype=np.float32)
    received = sum(through(feedback, "int8", {"w": step})["w"] for _ in range(100))
    assert abs(float(received[1]) - 0.1) < 0.005


def test_a_mean_of_encoded_differences_is_that_of_what_was_decoded() -> None:
    params = {"w": np.random.default_rng(1).standard_normal(BLOCK + 3).astype(np.float32)}
    schema = schema_of(tensors_of(params))
    for delta in DELTAS:
        with (
            sealed(params) as difference,
            ErrorFeedback(schema, delta).encoded(difference) as encoded,
            sealed({"w": np.ones(BLOCK + 3, dtype=np.float32)}) as model,
        ):
            mean = WeightedMean(schema, ParamsType.DIFF)
            mean.fold(admit_update(encoded.source, schema, site="a", delta=delta), 2.0)
            with mean.result(model.tensors()) as result:
                found = result.tensors().array("w")
                assert np.abs(found - 1 - params["w"]).max() < 0.05
                assert not np.array_equal(found, 1 + params["w"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w" + SCALE: np.array(np.nan, dtype=np.float32)}, "scale"),
        ({"w" + SCALE: np.array(np.inf, dtype=np.float32)}, "scale"),
        ({"w" + SCALE: np.array(-1, dtype=np.float32)}, "scale"),
        ({"w" + SCALE: np.array(1e30, dtype=np.float32)}, "magnitude"),
        ({"w" + SCALE: np.zeros(1, dtype=np.float32)}, "not what a difference"),
        ({"w": np.zeros(3, dtype=np.int16)}, "not what a difference"),
        ({"w": np.zeros(4, dtype=np.int8)}, "not what a difference"),
        ({"other": np.zeros(1, dtype=np.int8)}, "not what a difference"),
    ],
)
def test_a_hostile_difference_is_decoded_before_it_is_checked(change: dict[str, npt.NDArray[Any]], reason: str) -> None:
    good = {"w": np.full(3, STEPS, dtype=np.int8), "w" + SCALE: np.array(0.5, dtype=np.float32)}
    schema = {"w": TensorSpec("F32", (3,))}
    assert admit_update(encode(tensors_of(good)), schema, site="a", delta="int8").array("w").max() == STEPS / 2
    with pytest.raises(UpdateRefused, match=reason):
        admit_update(encode(tensors_of({**good, **change})), schema, site="a", delta="int8")


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xFF80])
def test_infinities_and_nans_of_bf16_are_refused(bits: int) -> None:
    raw = encode({"w": (TensorSpec("BF16", (1,)), np.array([bits], dtype=np.uint16).tobytes())})
    with pytest.raises(UpdateRefused, match=r"NaN|infinity"):
        admit_update(raw, {"w": TensorSpec("F32", (1,))}, site="a", delta="bf16")


def test_a_plain_update_is_no_encoded_one() -> None:
    raw = encode(tensors_of({"w": np.zeros(3, dtype=np.float32)}))
    with pytest.raises(UpdateRefused, match="not what a difference"):
        admit_update(raw, {"w": TensorSpec("F32", (3,))}, site="a", delta="bf16")


def job(folder: Path, delta: str | None, **changes: Any) -> tuple[Bundle, SealedMemory]:
    return make_job(
        folder, TRAIN, initial_model={"w": np.zeros(500, dtype=np.float32)}, num_rounds=3, delta=delta, **changes
    )


def test_the_recipe_s_argument_is_the_same_in_a_simulation_and_in_production(tmp_path: Path) -> None:
    bundle, model = job(tmp_path, "int8")
    world = found_federation(tmp_path)
    world.approve(bundle)
    with (
        world.server() as address,
        world.site(address, SITES[0]),
        world.site(address, SITES[1]),
        world.client(address) as client,
        model,
    ):
        mine = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        assert [event.text for event in client.watch(mine, timeout=60)][-1] == "finished"
        produced = load_file(client.download(mine, tmp_path / "result", ledgers=None) / "model.safetensors")["w"]
    recipe = FedAvgRecipe(
        name="trial",
        min_clients=2,
        num_rounds=3,
        train_script=str(tmp_path / "code" / "client.py"),
        initial_model={"w": np.zeros(500, dtype=np.float32)},
        delta="int8",
    )
    run = recipe.execute(SimEnv(clients=list(SITES), workspace_root=str(tmp_path / "work")))
    result = run.get_result()
    assert result is not None
    simulated = load_file(Path(result) / "model.safetensors")["w"]
    wanted = 0.003 * np.arange(500)
    assert np.array_equal(simulated, produced)
    assert 0 < np.abs(produced - wanted).max() < 0.499 / STEPS


def test_what_leaves_has_as_many_bits_as_are_debited(tmp_path: Path) -> None:
    bits = {delta: tensor_bits(job(tmp_path, delta)[0].settings) for delta in (None, *DELTAS)}
    assert bits == {None: 500 * 32, "bf16": 500 * 16, "int8": 500 * 8 + 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"params_type": "FULL"},
        {"secure_aggregation": True},
        {"robust": {"rule": "norm-clipping"}},
        {"aggregator": "client.py"},
        {"initial_model": {"w": np.zeros(3, dtype=np.int64)}},
        {"initial_model": {"w" + SCALE: np.zeros(3, dtype=np.float32)}},
    ],
)
def test_what_has_no_encoded_differences_says_so(tmp_path: Path, changes: dict[str, Any]) -> None:
    arguments = {"initial_model": {"w": np.zeros(3, dtype=np.float32)}, **changes}
    with pytest.raises(RecipeUnusable, match="delta"):
        make_job(tmp_path, TRAIN, delta="bf16", **arguments)
