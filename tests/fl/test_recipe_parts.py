"""What a recipe can be given beside its script: per-site settings, filters, files, a checkpoint, an aggregator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fl import FedAvgRecipe, SimEnv
from fl.errors import JobFailed, RecipeUnusable
from fl.jobs.bundle import parse_bundle
from fl.recipes.recipe import Recipe, take_export_flag

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from fl import client as flare

flare.init()
step = float(sys.argv[1])
while flare.is_running():
    received = flare.receive()
    flare.send(flare.FLModel(params={"w": received.params["w"] + step}, meta={"NUM_STEPS_CURRENT_ROUND": step}))
"""
FILTERS = """
def doubled(model):
    model.params = {name: value * 2 for name, value in model.params.items()}
    return model


def negated(model):
    model.params = {name: -value for name, value in model.params.items()}
    return model


def forgotten(model):
    pass
"""
MEDIAN = """
import numpy as np
from fl.aggregation.custom import Aggregator, serve


class Median(Aggregator):
    def __init__(self):
        self.updates = []

    def accept(self, update, site):
        assert update.params_type == "FULL" and site and update.meta["NUM_STEPS_CURRENT_ROUND"] > 0
        self.updates.append(np.array(update.params["w"]))

    def aggregate(self, model):
        found, self.updates = np.median(self.updates, axis=0), []
        return {"w": found.astype(model["w"].dtype)}


serve(Median())
"""


def make(folder: Path, script: str = SCRIPT, **changes: Any) -> Recipe:
    code = folder / "code"
    code.mkdir(exist_ok=True)
    (code / "client.py").write_text(script)
    (code / "filters.py").write_text(FILTERS)
    (code / "median.py").write_text(MEDIAN)
    shared = {
        "name": "parts",
        "min_clients": 2,
        "num_rounds": 1,
        "train_script": str(code / "client.py"),
        "train_args": "1",
        "round_seconds": 30,
        "initial_model": {"w": np.zeros(2, dtype=np.float32)},
    }
    return FedAvgRecipe(**{**shared, **changes})


def result_of(recipe: Recipe, folder: Path, clients: int = 2) -> list[float]:
    run = recipe.execute(SimEnv(num_clients=clients, workspace_root=folder / "runs"))
    return load_file(run.get_result() / "model.safetensors")["w"].tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


def attested(recipe: Recipe, world: FederationWorld, server: str, folder: Path) -> list[float]:
    bundle = recipe.bundle()
    world.approve(bundle)
    with (
        world.site(server, SITES[0], number=1),
        world.site(server, SITES[1], number=1),
        world.client(server) as client,
        recipe.first_model() as model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        events = list(client.watch(job, timeout=60))
        assert [event.text for event in events if event.kind == "status"][-1] == "finished", world.told
        return load_file(client.download(job, folder / "result", ledgers=None) / "model.safetensors")["w"].tolist()


def test_a_site_can_have_a_script_and_a_command_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "other.py").write_text(SCRIPT.replace("+ step", "- step"))
    config = {"site-2": {"train_args": "3"}, "site-3": {"train_script": "other.py", "train_args": ["4"]}}
    recipe = make(tmp_path, per_site_config=config)
    assert result_of(recipe, tmp_path, clients=3) == [pytest.approx((1 + 9 - 16) / 8)] * 2


def test_per_site_settings_hold_on_the_attested_path(world: FederationWorld, server: str, tmp_path: Path) -> None:
    recipe = make(tmp_path, per_site_config={SITES[1]: {"train_args": "3"}})
    assert attested(recipe, world, server, tmp_path) == [2.5, 2.5]


def test_filters_change_what_is_received_and_what_is_sent(tmp_path: Path) -> None:
    recipe = make(tmp_path, initial_model={"w": np.ones(2, dtype=np.float32)})
    recipe.add_client_input_filter("filters:doubled")
    recipe.add_client_output_filter("filters:negated")
    recipe.add_client_output_filter("filters:doubled")
    assert result_of(recipe, tmp_path) == [-6.0, -6.0]  # ((1 * 2) + 1) * -1 * 2


def test_filters_run_in_the_sandbox_too(world: FederationWorld, server: str, tmp_path: Path) -> None:
    recipe = make(tmp_path)
    recipe.add_client_output_filter("filters:negated")
    assert attested(recipe, world, server, tmp_path) == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "words"), [("filters:forgotten", "gave back a NoneType"), ("filters:missing", "is not there")]
)
def test_a_filter_that_is_none_ends_its_client(name: str, words: str, tmp_path: Path) -> None:
    recipe = make(tmp_path)
    recipe.add_client_output_filter(name)
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "failed"
    assert run.logs(grep=words)


def test_a_function_of_the_job_s_own_script_is_no_filter(tmp_path: Path) -> None:
    with pytest.raises(RecipeUnusable, match="no module that a script can import"):
        make(tmp_path).add_client_output_filter(lambda model: model)


def test_added_files_are_in_the_bundle_and_beside_the_script(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "tables").mkdir(parents=True)
    (shared / "steps.py").write_text("STEP = 7.0\n")
    (shared / "tables" / "a.txt").write_text("5")
    script = SCRIPT.replace("step = float(sys.argv[1])", "import steps; step = steps.STEP")
    recipe = make(tmp_path, script=script)
    recipe.add_client_file(shared / "steps.py")
    recipe.add_server_file(str(shared / "tables"))
    assert {"steps.py", "tables/a.txt", "client.py"} <= recipe.bundle().files.keys()
    assert result_of(recipe, tmp_path) == [7.0, 7.0]
    with pytest.raises(RecipeUnusable, match="there is no file"):
        recipe.add_file("nowhere.txt")
    (shared / "client.py").write_text("# another")
    with pytest.raises(RecipeUnusable, match=r"another file client\.py"):
        recipe.add_file(shared / "client.py")


def test_a_checkpoint_gives_the_first_model_its_numbers(tmp_path: Path) -> None:
    save_file({"w": np.array([3.0, 4.0], dtype=np.float32)}, tmp_path / "start.safetensors")
    np.save(tmp_path / "start.npy", np.array([5.0, 6.0], dtype=np.float32))
    assert result_of(make(tmp_path, initial_ckpt=tmp_path / "start.safetensors"), tmp_path) == [4.0, 5.0]
    array = make(tmp_path, initial_model=None, initial_ckpt=tmp_path / "start.npy")
    assert list(array.settings.model) == ["numpy_key"]
    save_file({"v": np.zeros(2, dtype=np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "old.pt").write_bytes(b"\x80\x04")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name, words in (
        ("other.safetensors", "not as in the model"),
        ("old.pt", "neither .safetensors nor .npy"),
        ("none.safetensors", "there is no file"),
        ("objects.npy", "is no array"),
    ):
        with pytest.raises(RecipeUnusable, match=words):
            make(tmp_path, initial_ckpt=tmp_path / name)


def test_an_aggregator_of_one_s_own_makes_the_model(tmp_path: Path) -> None:
    config = {f"site-{number}": {"train_args": str(step)} for number, step in ((1, 1), (2, 2), (3, 900))}
    recipe = make(tmp_path, aggregator="median.py", per_site_config=config, num_rounds=2)
    assert result_of(recipe, tmp_path, clients=3) == [4.0, 4.0]


def test_an_aggregator_runs_in_a_sandbox_at_an_attested_server(
    world: FederationWorld, server: str, tmp_path: Path
) -> None:
    recipe = make(tmp_path, aggregator="median.py", per_site_config={SITES[1]: {"train_args": "3"}}, num_rounds=2)
    assert attested(recipe, world, server, tmp_path) == [4.0, 4.0]  # the median of two is their plain mean


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('return {"w": found.astype(model["w"].dtype)}', "return {}"),
        ("found, self", "raise SystemExit('ill'); found, self"),
        ("found.astype", "(found * np.nan).astype"),
    ],
)
def test_an_aggregator_that_fails_or_gives_no_model_fails_the_job(change: str, words: str, tmp_path: Path) -> None:
    recipe = make(tmp_path, aggregator="median.py")
    source = tmp_path / "code" / "median.py"
    source.write_text(MEDIAN.replace(change, words, 1))
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    with pytest.raises(JobFailed, match="aggregator"):
        run.get_result()


def test_execute_exports_when_its_command_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(SCRIPT)
    (tmp_path / "job.py").write_text(
        "import argparse, numpy as np\n"
        "from fl import FedAvgRecipe, SimEnv\n"
        "model = {'w': np.zeros(1)}\n"
        "recipe = FedAvgRecipe(name='told', min_clients=1, initial_model=model, train_script='client.py')\n"
        "argparse.ArgumentParser().parse_args()\n"
        "recipe.execute(SimEnv(num_clients=1))\n"
        "raise SystemExit('it ran')\n"
    )
    command = [sys.executable, "job.py", "--export", "--export-dir", "out"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    bundle = parse_bundle((tmp_path / "out" / "job.bundle").read_bytes())
    assert bundle.settings.name == "told"
    assert bundle.digest in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@given(st.lists(st.sampled_from(["--export", "--export-dir", "--export-dir=x", "out", "--rounds", "3"]), max_size=8))
def test_export_words_are_taken_from_a_command_line_and_no_others(words: list[str]) -> None:
    left = list(words)
    folder = take_export_flag(left)
    if words and words[-1] == "--export-dir" and words[-2:-1] != ["--export-dir"]:
        assert (folder, left) == (None, words)
        return
    if folder is None and left == words:
        return
    assert (folder is not None) == ("--export" in _outside_values(words))
    assert not any(word.startswith("--export") for word in left)
    assert [word for word in left if word in ("--rounds", "3")] == [
        word for word in _outside_values(words) if word in ("--rounds", "3")
    ]


def _outside_values(words: list[str]) -> list[str]:
    """The words that are no value of `--export-dir`."""
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
            continue
        skip = word == "--export-dir"
        found.append(word)
    return found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_site_config": {"site-1": {"lr": 1}}}, "lr cannot be set"),
        ({"per_site_config": {"Site 1": {"train_args": "1"}}}, "String should match"),
        ({"per_site_config": {"site-1": {"train_args": "'"}}}, "No closing quotation"),
        ({"train_script": None}, "train_script is missing"),
    ],
)
def test_wrong_parts_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeUnusable, match=words):
        make(tmp_path, **changes)


def test_a_script_that_is_not_in_the_bundle_makes_none(tmp_path: Path) -> None:
    recipe = make(tmp_path, per_site_config={"site-1": {"train_script": "missing.py"}})
    with pytest.raises(RecipeUnusable, match=r"script 'missing\.py' is not among the files"):
        recipe.bundle()


def test_a_simulation_s_logs_and_metrics_are_told(tmp_path: Path) -> None:
    script = SCRIPT.replace("flare.init()", "flare.init(); print('hello from', flare.get_site_name())")
    run = make(tmp_path, script=script).execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    assert run.logs(grep="hello") == ["site-1: hello from site-1", "site-2: hello from site-2"]
    assert run.logs(tail=0) == []
    assert run.logs(grep="(.*)") == []  # no pattern: a bracket is a bracket
    assert run.metrics() == [{"round": 0, "mean": {}, "sites": {"site-1": {}, "site-2": {}}}]
    assert json.loads((run.get_result() / "job.json").read_text())["status"] == "finished"
