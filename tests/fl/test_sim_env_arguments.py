"""SimEnv's arguments one by one, each seen to do what it says; tracking and backends where their libraries are."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv, add_experiment_tracking
from fl.environments.display import Display
from fl.environments.sim import gpus_of
from fl.errors import RecipeUnusable
from fl.jobs.progress import JobEvent
from fl.recipes.recipe import Recipe

SCRIPT = """
import logging
import os
import time

import numpy as np
from fl import client as flare

flare.init()
logging.getLogger("script").debug("a debug line")
print("sees GPUs", os.environ.get("CUDA_VISIBLE_DEVICES", "of the host"))
while flare.is_running():
    received = flare.receive()
    began = time.monotonic()
    time.sleep(0.3)
    flare.log("began", began)
    flare.log("ended", time.monotonic())
    flare.send(flare.FLModel(params={"w": received.params["w"] + 1}, metrics={"seen": 0.5}))
"""


def make(folder: Path) -> Recipe:
    code = folder / "code"
    code.mkdir(exist_ok=True)
    (code / "client.py").write_text(SCRIPT)
    return FedAvgRecipe(
        name="arguments",
        min_clients=2,
        num_rounds=1,
        initial_model={"w": np.zeros(2, dtype=np.float32)},
        train_script=str(code / "client.py"),
    )


def test_clients_are_named_or_counted(tmp_path: Path) -> None:
    assert SimEnv(clients=["acme-pharma", "cygnus-bio"]).clients == ["acme-pharma", "cygnus-bio"]
    assert SimEnv(num_clients=3).clients == ["site-1", "site-2", "site-3"]
    assert SimEnv(["a", "b"], 2).clients == ["a", "b"]
    for wrong in ({}, {"num_clients": 0}, {"clients": ["a"], "num_clients": 2}, {"clients": ["Ä"]}):
        with pytest.raises(RecipeUnusable):
            SimEnv(**wrong)


@pytest.mark.parametrize(("threads", "together"), [(1, 1), (3, 3)])
def test_num_threads_is_how_many_train_at_the_same_time(threads: int, together: int, tmp_path: Path) -> None:
    env = SimEnv(num_clients=3, num_threads=threads, workspace_root=tmp_path / "runs")
    record = json.loads((make(tmp_path).execute(env).get_result() / "job.json").read_text())
    moments: list[tuple[float, int]] = []
    for value in record["values"]:
        moments += [(value["began"], 1)] if "began" in value else [(value["ended"], -1)]
    most, now = 0, 0
    for _, step in sorted(moments):
        now += step
        most = max(most, now)
    assert most <= together
    assert len(moments) == 6


def test_gpu_config_deals_devices_to_clients(tmp_path: Path) -> None:
    env = SimEnv(num_clients=3, gpu_config="[0,1],[2]", workspace_root=tmp_path / "runs")
    run = make(tmp_path).execute(env)
    assert run.logs(grep="sees GPUs") == [f"site-{n} sees GPUs {g}".replace(" ", ": ", 1) for n, g in
                                          ((1, "0,1"), (2, "2"), (3, "0,1"))]  # fmt: skip


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 9))
def test_every_way_to_write_devices_is_read(groups: list[list[int]], clients: int) -> None:
    names = [f"site-{number}" for number in range(clients)]
    text = ", ".join(f"[{','.join(map(str, group))}]" if len(group) > 1 else str(group[0]) for group in groups)
    found = gpus_of(names, text)
    assert found == {name: ",".join(map(str, groups[at % len(groups)])) for at, name in enumerate(names)}


@pytest.mark.parametrize("text", ["", "gpu0", "[0", "0,,1", "-1", "[]", "0;1", "[0,[1]]"])
def test_what_is_no_list_of_devices_is_refused(text: str) -> None:
    with pytest.raises(RecipeUnusable, match="no list of GPUs"):
        SimEnv(num_clients=2, gpu_config=text)


def test_log_config_full_writes_a_line_for_each_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).execute(SimEnv(num_clients=2, log_config="full", workspace_root=tmp_path / "runs"))
    lines = capfd.readouterr().err.splitlines()
    assert "round 1 is done: seen 0.5" in lines
    assert not any("sees GPUs" in line for line in lines)


def test_log_config_concise_is_silent_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).execute(SimEnv(num_clients=2, log_config="concise", workspace_root=tmp_path / "runs"))
    assert capfd.readouterr().err == ""


def test_log_config_verbose_shows_what_clients_say(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).execute(SimEnv(num_clients=2, log_config="verbose", workspace_root=tmp_path / "runs"))
    lines = capfd.readouterr().err.splitlines()
    assert {"site-1: a debug line", "site-2: sees GPUs of the host"} <= set(lines)


def test_log_config_can_be_a_file_for_the_clients(tmp_path: Path) -> None:
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"marked": {"format": "MARK %(name)s %(message)s"}},
        "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "marked"}},
        "root": {"level": "DEBUG", "handlers": ["out"]},
    }
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(config))
    run = make(tmp_path).execute(SimEnv(num_clients=2, log_config=file, workspace_root=tmp_path / "runs"))
    assert "site-1: MARK script a debug line" in run.logs()
    for text, words in (("nonsense", "is not JSON"), ("{}", "no configuration of logging")):
        file.write_text(text)
        with pytest.raises(RecipeUnusable, match=words):
            SimEnv(num_clients=2, log_config=file)
    with pytest.raises(RecipeUnusable, match="no mode and no file"):
        SimEnv(num_clients=2, log_config="chatty")


def test_results_go_under_workspace_root_and_are_the_users_alone(tmp_path: Path) -> None:
    result = make(tmp_path).execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs")).get_result()
    assert result.parent == tmp_path / "runs"
    assert result.stat().st_mode & 0o777 == 0o700
    assert not list(result.glob("checkpoint*"))


def test_wrong_backends_and_threads_are_named() -> None:
    with pytest.raises(RecipeUnusable, match="backend"):
        SimEnv(num_clients=2, backend="dask")
    with pytest.raises(RecipeUnusable, match="num_threads is 0"):
        SimEnv(num_clients=2, num_threads=0)


def test_without_ray_its_backend_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeUnusable, match=r"sealwright\[ray\]"):
        make(tmp_path).execute(SimEnv(num_clients=2, backend="ray", workspace_root=tmp_path / "runs"))


def test_ray_actors_train_as_processes_do(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sealwright[ray]'")
    run = make(tmp_path).execute(SimEnv(num_clients=2, backend="ray", workspace_root=tmp_path / "runs"))
    assert run.get_status() == "finished"
    assert load_file(run.get_result() / "model.safetensors")["w"].tolist() == [1.0, 1.0]
    assert run.logs(grep="sees GPUs")


def test_an_mlflow_run_has_every_metric(tmp_path: Path) -> None:
    tracking = pytest.importorskip(
        "mlflow.tracking", reason="MLflow is not installed: pip install 'sealwright[mlflow]'"
    )
    recipe = make(tmp_path)
    add_experiment_tracking(recipe, "mlflow")
    result = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs")).get_result()
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{result}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("arguments")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == result.name
    assert run.data.params["recipe"] == "fedavg"
    assert run.data.metrics.keys() >= {"global/seen", "site/site-1/seen", "site/site-2/began"}


def test_unknown_tracking_and_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(tmp_path)
    with pytest.raises(RecipeUnusable, match="not known"):
        add_experiment_tracking(recipe, "wandb")
    add_experiment_tracking(recipe, "mlflow")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeUnusable, match="MLflow is not installed"):
        recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))


def test_a_notebook_shows_one_output_that_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Any] = []

    class ZMQInteractiveShell:
        """A notebook's shell is known by its class's name."""

    class Handle:
        def update(self, page: str) -> None:
            pages.append(("update", page))

    def display(page: str, display_id: bool) -> Handle:
        pages.append(("first", page))
        return Handle()

    package = types.ModuleType("IPython")
    package.get_ipython = lambda: ZMQInteractiveShell()  # type: ignore[attr-defined]
    part = types.ModuleType("IPython.display")
    part.HTML, part.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    with Display("hello", 2, io.StringIO()) as shown:
        assert shown.live
        shown.observe(JobEvent(kind="joined", site="site-<1>"))
        shown.observe(JobEvent(kind="round", round=0))
        shown.observe(JobEvent(kind="aggregated", round=0, values={"accuracy": 0.5}))
        shown.observe(JobEvent(kind="value", site="site-<1>", round=0, values={"x": 1.0}))
    assert [kind for kind, _ in pages] == ["first", "update", "update", "update"]
    assert "accuracy 0.5" in pages[-1][1]
    assert "site-<1>" not in "".join(page for _, page in pages)
