"""Robust rules: what they are by their papers, and that poisoned updates do not move them far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv
from fl.aggregation.robust import RobustAggregation, krum, norm_clipped, trimmed_mean
from fl.errors import AggregationFailed, JobFailed, RecipeUnusable
from fl.jobs.settings import NormClipping, TrimmedMean
from fl.model import ParamsType, tensors_of
from fl.tensors import TensorSpec, encode, parse

HONEST = np.random.default_rng(1).normal(1.0, 0.1, (7, 40)).astype(np.float32)


def poisoned(count: int, value: float) -> Any:
    return np.concatenate([HONEST, np.full((count, 40), value, dtype=np.float32)])


@pytest.mark.parametrize("value", [1e20, -1e20, 50.0, 0.0])
def test_poison_does_not_move_them_far(value: float) -> None:
    """Two of nine updates are an attacker's; a plain mean would go where it likes."""
    table = poisoned(2, value)
    assert np.abs(krum(table, 2, 1) - 1).max() < 0.5
    assert np.abs(krum(table, 2, 5) - 1).max() < 0.3
    assert np.abs(trimmed_mean(table, 0.25) - 1).max() < 0.3
    assert np.linalg.norm(norm_clipped(table, None)) <= np.median(np.linalg.norm(HONEST, axis=1)) * 1.1


def test_krum_takes_the_update_with_the_nearest_neighbours() -> None:
    """By hand: of five points one is far off; for the others the two nearest count (n - f - 2 = 2)."""
    table = np.array([[0.0], [1.0], [1.5], [2.0], [100.0]])
    assert krum(table, 1, 1) == pytest.approx([1.5])
    assert krum(table, 1, 4) == pytest.approx([1.125])


def test_trimmed_mean_by_hand() -> None:
    table = np.array([[1.0, 9.0], [2.0, 8.0], [3.0, 7.0], [4.0, -100.0], [500.0, 6.0]])
    assert trimmed_mean(table, 0.2) == pytest.approx([3.0, 7.0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.floats(0.01, 100))
def test_clipping_is_the_mean_where_nothing_is_clipped(count: int, norm: float) -> None:
    table = np.random.default_rng(count).normal(size=(count, 10))
    bound = float(np.linalg.norm(table, axis=1).max()) + norm
    assert norm_clipped(table, bound) == pytest.approx(table.mean(axis=0))
    assert np.linalg.norm(norm_clipped(table, norm)) <= norm * (1 + 1e-9)


def test_too_few_updates_are_told() -> None:
    with pytest.raises(AggregationFailed, match="it needs 5"):
        krum(HONEST[:4], 1, 1)
    with pytest.raises(AggregationFailed, match="nothing is left"):
        trimmed_mean(HONEST[:2], 0.4)


@pytest.mark.parametrize("kind", [ParamsType.FULL, ParamsType.DIFF])
def test_parameters_and_differences_come_to_the_same(kind: ParamsType) -> None:
    schema = {"b": TensorSpec("F16", (2,)), "a": TensorSpec("F32", (3,)), "c": TensorSpec("BF16", (1,))}
    model = {"b": np.array([1, 2], dtype=np.float16), "a": np.array([3, 4, 5], dtype=np.float32)}
    rule = RobustAggregation({name: schema[name] for name in model}, kind, TrimmedMean(trim=0.3))
    for moved in (1.0, 2.0, 300.0):
        base = {name: value if kind is ParamsType.FULL else np.zeros_like(value) for name, value in model.items()}
        raw = encode(tensors_of({name: value + value.dtype.type(moved) for name, value in base.items()}))
        rule.fold(parse(raw, max_size=1 << 16), weight=1e9)
    raw = encode(tensors_of(model))
    with rule.result(parse(raw, max_size=1 << 16)) as memory:
        found = parse(memory.view, max_size=memory.size)
        assert found.array("a").tolist() == [5, 6, 7]
        assert found.array("b").tolist() == [3, 4]
        found.raw.release()
    rule.close()


SCRIPT = """
import numpy as np
from fl import client as flare

flare.init()
bad = flare.get_site_name() == "site-1"
while flare.is_running():
    received = flare.receive()
    add = np.float32(1e6 if bad else 1)
    meta = {"NUM_STEPS_CURRENT_ROUND": 2**30 if bad else 1}
    flare.send(flare.FLModel(params={"w": received.params["w"] + add}, meta=meta))
"""


def run(folder: Path, rule: Any, clients: int = 5) -> Any:
    (folder / "client.py").write_text(SCRIPT)
    recipe = FedAvgRecipe(
        name="robust",
        initial_model={"w": np.zeros(4, dtype=np.float32)},
        min_clients=2,
        num_rounds=2,
        train_script=str(folder / "client.py"),
        robust=rule,
    )
    found = recipe.execute(SimEnv(num_clients=clients, workspace_root=folder / "runs"))
    return load_file(found.get_result() / "model.safetensors")["w"]


@pytest.mark.parametrize("rule", [{"rule": "krum", "byzantine": 1}, {"rule": "trimmed-mean", "trim": 0.2}])
def test_a_poisoned_job(tmp_path: Path, rule: Any) -> None:
    """One of five clients sends a million, with the largest weight there is."""
    assert run(tmp_path, rule).tolist() == [2, 2, 2, 2]


def test_norms_are_clipped_in_a_job(tmp_path: Path) -> None:
    assert np.abs(run(tmp_path, NormClipping(norm=2.0).model_dump()) - 2).max() < 1e-5


def test_a_job_with_too_few_clients_says_why(tmp_path: Path) -> None:
    with pytest.raises((JobFailed, AggregationFailed), match="it needs 5"):
        run(tmp_path, {"rule": "krum", "byzantine": 1}, clients=3)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("")
    with pytest.raises(RecipeUnusable, match="excludes it"):
        FedAvgRecipe(
            initial_model={"w": np.zeros(1, dtype=np.float32)},
            min_clients=2,
            train_script=str(tmp_path / "client.py"),
            secure_aggregation=True,
            robust={"rule": "krum", "byzantine": 1},
        )
