"""PocEnv: real services on this machine by one call, and nothing left of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fl import FedAvgRecipe, PocEnv, add_cross_site_evaluation
from fl.errors import PeerLost, RecipeUnusable

SCRIPT = """
from fl import client as flare

flare.init()
a = float(flare.data_path("number.txt").read_text())
own = 0.0
while flare.is_running():
    received = flare.receive()
    own = received.params["w"] + a if flare.is_train() else own
    flare.send(flare.FLModel(params={"w": own}, metrics={"first": float(received.params["w"][0])}))
"""


def recipe(folder: Path) -> FedAvgRecipe:
    code = folder / "code"
    code.mkdir()
    (code / "client.py").write_text(SCRIPT)
    return FedAvgRecipe(
        name="poc",
        min_clients=2,
        num_rounds=2,
        initial_model={"w": np.zeros(2, dtype=np.float32)},
        train_script=str(code / "client.py"),
    )


def mine(folder: Path) -> list[str]:
    """The command lines of living processes that name `folder`."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        if str(folder) in line:
            lines.append(line)
    return lines


@pytest.mark.long
def test_one_call_runs_a_job_over_attested_services_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for site, number in (("borealis-hospital", 1.0), ("cygnus-bio", 3.0)):
        (tmp_path / "data" / site).mkdir(parents=True)
        (tmp_path / "data" / site / "number.txt").write_text(str(number))
    job = recipe(tmp_path)
    add_cross_site_evaluation(job)
    env = PocEnv(["borealis-hospital", "cygnus-bio"], data=tmp_path / "data", workspace_root=tmp_path / "runs")
    with env:
        run = job.execute(env)
        result = run.get_result(timeout=120)
        assert run.get_status() == "finished"
        assert load_file(result / "model.safetensors")["w"].tolist() == [4.0, 4.0]
        assert [row["mean"] for row in run.metrics()] == [{"first": 0.0}, {"first": 2.0}]
        assert run.logs(grep="the job is")[-1] == "the job is finished"
        assert mine(tmp_path / "sealwright-poc-")
    statement = json.loads((result / "statement.json").read_text())
    assert statement["ears"]
    matrix = json.loads((result / "job.json").read_text())["cross_site_evaluation"]
    assert matrix["cygnus-bio"]["borealis-hospital"] == {"first": 3.0}
    assert not mine(tmp_path / "sealwright-poc-")
    assert not list(tmp_path.glob("sealwright-poc-*"))


def test_what_the_command_says_is_told_when_services_do_not_come_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = tmp_path / "data" / "site-1"
    data.mkdir(parents=True)
    env = PocEnv(num_clients=2, data={"site-1": data, "site-2": data})
    data.rmdir()  # gone before the services start
    with pytest.raises(PeerLost, match="is not SITE=FOLDER"):
        recipe(tmp_path).execute(env)
    assert not list(tmp_path.glob("sealwright-poc-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_clients": 2, "gpu_ids": [0]}, "no GPU 0"),
        ({}, "give clients or num_clients"),
        ({"clients": ["a", "a"]}, "own name"),
        ({"num_clients": 65}, "1 to 64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeUnusable, match=words):
        PocEnv(**arguments)


def test_the_command_refuses_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    words = ["poc", str(tmp_path), "--site", "site-1", "--bundle", "none", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "appliance.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert "not empty" in json.loads(done.stdout)["error"]["what"]
