"""Evaluation across sites: one model at every site; after training, every site's own model at every site."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation
from hypothesis import given
from hypothesis import strategies as st
from recipe_jobs import NUMBERS, START, recipe_of
from safetensors.numpy import load_file

from fl import FedAvgRecipe, FedEvalRecipe, SimEnv, add_cross_site_evaluation
from fl.errors import RecipeUnusable
from fl.jobs.settings import JobSettings
from fl.recipes.recipe import Recipe

SCRIPT = """
import numpy as np
from fl import client as flare

flare.init()
a = float(flare.data_path("number.txt").read_text())
own = None
while flare.is_running():
    received = flare.receive()
    w = received.params["w"]
    distance = float(((w - a) ** 2).sum())
    if flare.is_submit_model():
        flare.send(flare.FLModel(params={"w": own}))
    elif flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"distance": distance}))
    else:
        assert flare.is_train()
        own = w - 0.3 * (w - a)
        flare.send(flare.FLModel(params={"w": own}, metrics={"distance": distance}))
"""


def make(folder: Path, kind: type[Recipe] = FedAvgRecipe, script: str = SCRIPT, **changes: object) -> Recipe:
    code = folder / "code"
    code.mkdir(exist_ok=True)
    (code / "client.py").write_text(script)
    rounds = {} if kind is FedEvalRecipe else {"num_rounds": 2}
    arguments = {"min_clients": 2, "train_script": str(code / "client.py"), "round_seconds": 30, **rounds, **changes}
    return kind(initial_model={"w": START}, **arguments)


def simulation(folder: Path) -> SimEnv:
    for name, number in NUMBERS.items():
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "number.txt").write_text(str(number))
    return SimEnv(clients=list(NUMBERS), data=folder / "data", workspace_root=folder / "runs")


def reference() -> dict[str, dict[str, float]]:
    """What each site finds of each model, in NumPy."""
    w, own = START, {}
    for _ in range(2):
        own = {site: w - 0.3 * (w - a) for site, a in NUMBERS.items()}
        w = np.mean(list(own.values()), axis=0)
    models = {"global": w, **own}
    return {
        site: {name: float(((model - a) ** 2).sum()) for name, model in models.items()} for site, a in NUMBERS.items()
    }


def assert_matrix(result: Path) -> None:
    record = json.loads((result / "job.json").read_text())
    found = record["cross_site_evaluation"]
    for site, row in reference().items():
        assert {name: metrics["distance"] for name, metrics in found[site].items()} == pytest.approx(row, rel=1e-5)
    assert len(record["rounds"]) == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


def test_every_site_evaluates_every_model_after_training(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    add_cross_site_evaluation(recipe)
    run = recipe.execute(simulation(tmp_path))
    assert_matrix(run.get_result())


def test_the_attested_path_gives_the_same_matrix(world: FederationWorld, server: str, tmp_path: Path) -> None:
    recipe = make(tmp_path)
    add_cross_site_evaluation(recipe)
    bundle = recipe.bundle()
    world.approve(bundle)
    with (
        world.site(server, SITES[0], number=NUMBERS[SITES[0]]),
        world.site(server, SITES[1], number=NUMBERS[SITES[1]]),
        world.client(server) as client,
        recipe.first_model() as model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        events = list(client.watch(job, timeout=60))
        assert [event.text for event in events if event.kind == "status"][-1] == "finished"
        assert_matrix(client.download(job, tmp_path / "result", ledgers=None))


def test_one_model_is_evaluated_where_data_are_and_stays_as_it_is(tmp_path: Path) -> None:
    run = make(tmp_path, FedEvalRecipe).execute(simulation(tmp_path))
    result = run.get_result()
    assert load_file(result / "model.safetensors")["w"].tolist() == START.tolist()
    wanted = {site: float(((START - a) ** 2).sum()) for site, a in NUMBERS.items()}
    assert run.metrics() == [
        {
            "round": 0,
            "mean": {"distance": pytest.approx(np.mean(list(wanted.values())))},
            "sites": {site: {"distance": pytest.approx(value)} for site, value in wanted.items()},
        }
    ]


def test_a_site_that_fails_to_evaluate_costs_no_result(tmp_path: Path) -> None:
    script = SCRIPT.replace("    elif flare.is_evaluate():\n", "    elif flare.is_evaluate():\n        assert a != 3\n")
    recipe = make(tmp_path, script=script)
    add_cross_site_evaluation(recipe)
    run = recipe.execute(simulation(tmp_path))
    assert run.get_status() == "finished"
    record = json.loads((run.get_result() / "job.json").read_text())
    assert record["cross_site_evaluation"].keys() == {"borealis-hospital"}
    assert record["sites"]["cygnus-bio"].startswith("lost")


def test_tensors_of_an_evaluation_do_not_leave_the_site(tmp_path: Path) -> None:
    """A script that goes past the client API and answers an evaluation with tensors is refused."""
    script = SCRIPT.replace(
        'flare.send(flare.FLModel(metrics={"distance": distance}))',
        'flare._session.task = "train"; flare.send(flare.FLModel(params={"w": w}))',
    )
    run = make(tmp_path, FedEvalRecipe, script=script).execute(simulation(tmp_path))
    assert run.get_status() == "failed"
    assert any("not in the model" in line for line in run.logs())


def test_recipes_without_a_model_have_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(RecipeUnusable, match="no model"):
        add_cross_site_evaluation(recipe_of("fedstats", tmp_path))
    with pytest.raises(RecipeUnusable, match="no such argument"):
        make(tmp_path, FedEvalRecipe, num_rounds=3)


@given(st.integers(1, 20), st.integers(1, 30), st.booleans(), st.booleans(), st.integers(-3, 60), st.integers(0, 2))
def test_a_job_asks_for_each_task_only_in_its_rounds(
    rounds: int, sites: int, crossed: bool, fedeval: bool, round_: int, kind: int
) -> None:
    settings = JobSettings.model_validate(
        {
            "name": "x",
            "recipe": "fedeval" if fedeval else "fedavg",
            "options": {"recipe": "fedeval"} if fedeval else None,
            "num_rounds": rounds,
            "min_clients": 1,
            "train_script": "x.py",
            "framework": "numpy",
            "model": {"w": {"dtype": "F32", "shape": (1,)}},
            "cross_site_evaluation": crossed,
        }
    )
    task = ("train", "evaluate", "submit_model")[kind]
    allowed = ["evaluate" if fedeval else "train"] * rounds
    allowed += (["submit_model"] + ["evaluate"] * (sites + 1)) if crossed else []
    inside = 0 <= round_ < len(allowed)
    assert settings.asks_for(task, round_, sites) == (inside and allowed[round_] == task)
