"""Rounds that are judged: the best model, early stops, and runs that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_jobs import JOBS, NUMBERS, recipe_of
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv
from fl.environments.sim import SimEnv as Simulation
from fl.errors import RecipeUnusable
from fl.jobs.settings import Selection
from fl.recipes.recipe import Recipe

SCRIPT = """
from fl import client as flare

CURVE = [0.1, 0.5, 0.9, 0.4, 0.3, 0.2]
flare.init()
while flare.is_running():
    received = flare.receive()
    assert received.params["w"].tolist() == [float(received.current_round)]
    metrics = {"accuracy": CURVE[received.current_round]}
    flare.send(flare.FLModel(params={"w": received.params["w"] + 1}, metrics=metrics))
"""


def make(folder: Path, script: str = SCRIPT, **changes: Any) -> Recipe:
    code = folder / "code"
    code.mkdir(exist_ok=True)
    (code / "client.py").write_text(script)
    shared = {"min_clients": 2, "num_rounds": 6, "train_script": str(code / "client.py"), "round_seconds": 30}
    return FedAvgRecipe(initial_model={"w": np.zeros(1, dtype=np.float32)}, **{**shared, **changes})


def run(recipe: Recipe, folder: Path) -> tuple[Path, dict[str, Any]]:
    done = recipe.execute(SimEnv(num_clients=2, workspace_root=folder / "runs"))
    result = done.get_result()
    return result, json.loads((result / "job.json").read_text())


def test_the_best_model_is_the_one_that_was_received_in_the_best_round(tmp_path: Path) -> None:
    result, record = run(make(tmp_path, key_metric="accuracy"), tmp_path)
    assert len(record["rounds"]) == 6
    assert record["best"] == {"round": 2, "accuracy": pytest.approx(0.9)}
    assert load_file(result / "best_model.safetensors")["w"].tolist() == [2.0]
    assert load_file(result / "model.safetensors")["w"].tolist() == [6.0]


@pytest.mark.parametrize(
    ("arguments", "rounds", "best"),
    [
        ({"stop_cond": "accuracy >= 0.5"}, 2, 1),
        ({"key_metric": "accuracy", "patience": 2}, 5, 2),
        ({"key_metric": "accuracy", "key_metric_mode": "min", "patience": 1}, 2, 0),
        ({"stop_cond": "accuracy <= 0.05", "patience": 3}, 4, 0),
    ],
)
def test_a_job_stops_when_it_is_good_enough_or_gets_no_better(
    arguments: dict[str, Any], rounds: int, best: int, tmp_path: Path
) -> None:
    _, record = run(make(tmp_path, **arguments), tmp_path)
    assert (record["status"], len(record["rounds"]), record["best"]["round"]) == ("finished", rounds, best)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stop_cond": "accuracy == 1"}, "no condition"),
        ({"stop_cond": "accuracy >= much"}, "no condition"),
        ({"stop_cond": "accuracy >= 1", "key_metric": "loss"}, "not about key_metric"),
        ({"stop_cond": "loss <= 1", "key_metric_mode": "max"}, "not about key_metric"),
        ({"patience": 2}, "needs key_metric"),
        ({"key_metric": "accuracy", "patience": 0}, "greater than or equal to 1"),
        ({"key_metrik": "accuracy"}, "no argument key_metrik"),
    ],
)
def test_what_is_no_way_to_judge_is_named(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeUnusable, match=words):
        make(tmp_path, **arguments)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.sampled_from(["max", "min"]))
def test_of_many_values_the_best_is_kept(values: list[float], mode: str) -> None:
    selection = Selection.model_validate({"metric": "x", "mode": mode})
    best: float | None = None
    for value in values:
        best = value if selection.better(value, best) else best
    assert best == (max(values) if mode == "max" else min(values))


def interrupted(name: str, folder: Path) -> str:
    """A run of the recipe that its third round ended: one site fails in it, and two are needed."""
    recipe = recipe_of(name, folder)
    script = folder / "code" / "client.py"
    good = script.read_text()
    mark = "received = flare.receive()\n" if "received = flare" in good else "variates.receive(flare.receive())\n"
    at = good.index(mark) + len(mark)
    counted = f"{good[:at]}    rounds = globals().get('rounds', 0) + 1\n    if rounds == 3: raise SystemExit('ill')\n"
    script.write_text(counted + good[at:])
    for site, number in NUMBERS.items():
        (folder / "data" / site).mkdir(parents=True)
        (folder / "data" / site / "number.txt").write_text(str(number))
    stopped = recipe.execute(environment(folder))
    assert stopped.get_status() == "failed"
    script.write_text(good)
    return stopped.get_job_id()


def environment(folder: Path, **more: Any) -> Simulation:
    return SimEnv(clients=list(NUMBERS), data=folder / "data", workspace_root=folder / "runs", **more)


@pytest.mark.parametrize("name", ["fedprox", "fedopt-adam", "cyclic"])
def test_a_run_goes_on_where_it_stopped_and_comes_to_the_same_end(name: str, tmp_path: Path) -> None:
    job = interrupted(name, tmp_path)
    done = recipe_of(name, tmp_path).execute(environment(tmp_path, resume=job))
    assert done.get_job_id() == job
    record = json.loads((done.get_result() / "job.json").read_text())
    assert [row["round"] for row in record["rounds"]][-2:] == [2, 3]
    found = load_file(done.get_result() / "model.safetensors")
    for key, wanted in JOBS[name][3]().items():
        np.testing.assert_allclose(found[key], wanted, rtol=1e-6, atol=1e-6)


def test_scaffold_goes_on_with_control_variates_of_zero(tmp_path: Path) -> None:
    job = interrupted("scaffold", tmp_path)
    done = recipe_of("scaffold", tmp_path, num_rounds=60).execute(environment(tmp_path, resume=job))
    w = load_file(done.get_result() / "model.safetensors")["w"]
    np.testing.assert_allclose(w, 2.5, atol=1e-3)  # the minimum of both sites' losses together


def test_what_is_no_earlier_run_of_the_recipe_is_refused(tmp_path: Path) -> None:
    job = interrupted("fedprox", tmp_path)
    with pytest.raises(RecipeUnusable, match="no run nothing-there"):
        recipe_of("fedprox", tmp_path).execute(environment(tmp_path, resume="nothing-there"))
    with pytest.raises(RecipeUnusable, match="another recipe"):
        recipe_of("fedprox", tmp_path, mu=0.5).execute(environment(tmp_path, resume=job))
    (tmp_path / "runs" / job / "checkpoint.safetensors").write_bytes(b"changed")
    with pytest.raises(RecipeUnusable, match="not the one it names"):
        recipe_of("fedprox", tmp_path).execute(environment(tmp_path, resume=job))
    (tmp_path / "runs" / job / "checkpoint.json").write_text("{}")
    with pytest.raises(RecipeUnusable, match="no checkpoint"):
        recipe_of("fedprox", tmp_path).execute(environment(tmp_path, resume=job))
    with pytest.raises(RecipeUnusable, match="no run's id"):
        environment(tmp_path, resume="../elsewhere")
