"""SimEnv end to end: the words of the design's example, and what a user meets when a script is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fl import FedAvgRecipe, SimEnv
from fl.errors import JobFailed, RecipeUnusable

ADDS_ONE = """
import sys
from fl import client as flare
flare.init()
while flare.is_running():
    received = flare.receive()
    assert (received.current_round, received.total_rounds) is not None
    flare.log("seen", float(received.params["w"][0]), step=received.current_round)
    flare.send(flare.FLModel(params={"w": received.params["w"] + 1}, metrics={"m": received.current_round}))
print("args", sys.argv[1:], flare.get_site_name())
"""


def recipe_of(folder: Path, script: str, **changes: object) -> FedAvgRecipe:
    (folder / "code").mkdir(exist_ok=True)
    path = folder / "code" / "client.py"
    path.write_text(script)
    arguments: dict[str, object] = {
        "name": "hello",
        "initial_model": {"w": np.zeros(3, dtype=np.float32)},
        "min_clients": 2,
        "num_rounds": 2,
        "train_script": str(path),
        **changes,
    }
    return FedAvgRecipe(**arguments)  # type: ignore[arg-type]  # a test passes wrong arguments too


def test_a_numpy_job_runs_to_its_result(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, ADDS_ONE, train_args="--flag 'two words'")
    run = recipe.execute(SimEnv(num_clients=3, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "finished"
    result = run.get_result()
    np.testing.assert_array_equal(load_file(result / "model.safetensors")["w"], [2, 2, 2])
    assert "args ['--flag', 'two words'] site-3" in (result / "site-3" / "log.txt").read_text()
    assert result.stat().st_mode & 0o777 == 0o700
    assert (result / "model.safetensors").stat().st_mode & 0o777 == 0o600
    events: list[str] = []
    run.watch(lambda event: events.append(event.kind))
    assert events.count("update") == 6
    assert events.count("value") == 6
    run.abort()
    assert run.get_status() == "finished"


def test_the_words_of_the_design_work_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(
        "import torch\nclass SimpleNetwork(torch.nn.Module):\n"
        "    def __init__(self, width=3):\n        super().__init__()\n        self.layer = torch.nn.Linear(width, 2)\n"
    )
    (tmp_path / "client.py").write_text(
        "import argparse\nfrom fl import client as flare\nfrom network import SimpleNetwork\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('--batch_size', type=int)\n"
        "arguments = parser.parse_args()\nflare.init()\nnetwork = SimpleNetwork()\n"
        "while flare.is_running():\n    received = flare.receive()\n    network.load_state_dict(received.params)\n"
        "    flare.send(flare.FLModel(params=network.state_dict(), metrics={'accuracy': 0.5},"
        " meta={'NUM_STEPS_CURRENT_ROUND': arguments.batch_size}))\n"
    )
    (tmp_path / "job.py").write_text(
        "from fl import FedAvgRecipe, SimEnv, add_experiment_tracking\n"
        "from network import SimpleNetwork\n"
        'recipe = FedAvgRecipe(name="hello-pt", min_clients=2, num_rounds=3, initial_model=SimpleNetwork(), '
        'train_script="client.py", train_args="--batch_size 32")\n'
        'add_experiment_tracking(recipe, tracking_type="tensorboard")\n'
        "run = recipe.execute(SimEnv(num_clients=2)); print(run.get_status()); print(run.get_result())\n"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py"], cwd="/", env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    status, result = done.stdout.split()
    assert status == "finished"
    assert (Path(result) / "model.safetensors").is_file()
    assert list((Path(result) / "events").glob("events.out.tfevents.*"))
    assert done.stderr == "", "a run without a terminal is quiet"


def test_a_class_path_makes_the_same_job_as_an_instance(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "net_by_path.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
        "        self.layer = torch.nn.Linear(width, 2)\n"
    )
    described = {"class_path": "net_by_path.Net", "args": {"width": 5}}
    for argument in ("initial_model", "model"):
        recipe = recipe_of(tmp_path, ADDS_ONE, **{"initial_model": None, argument: described})
        assert recipe.settings.framework == "pytorch"
        assert recipe.settings.model["layer.weight"].shape == (2, 5)


def test_a_failing_script_is_named_with_its_last_line_and_ends_the_job(tmp_path: Path) -> None:
    failing = "from fl import client as flare\nflare.init()\nflare.receive()\nraise ValueError('no patients')\n"
    recipe = recipe_of(tmp_path, failing)
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "failed"
    with pytest.raises(JobFailed, match="are needed") as failure:
        run.get_result()
    assert any("ended with status 1: ValueError: no patients" in reason for reason in failure.value.reasons)


def test_one_failing_client_of_three_is_left_out(tmp_path: Path) -> None:
    script = ADDS_ONE.replace("flare.init()", "flare.init()\nif flare.get_site_name() == 'site-2': sys.exit('ill')", 1)
    run = recipe_of(tmp_path, script).execute(SimEnv(num_clients=3, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "finished"
    assert "ended with status 1: ill" in (run.get_result() / "job.json").read_text()


def test_after_a_failure_nobody_is_waited_for(tmp_path: Path) -> None:
    script = (
        "import time\nfrom fl import client as flare\nflare.init()\nflare.receive()\n"
        "if flare.get_site_name() == 'site-1':\n    raise SystemExit('ill')\ntime.sleep(60)\n"
    )
    began = time.monotonic()
    run = recipe_of(tmp_path, script).execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "failed"
    assert time.monotonic() - began < 15


def test_an_interrupt_ends_every_process(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(
        "import os, pathlib, time\nfrom fl import client as flare\nflare.init()\nflare.receive()\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    (tmp_path / "job.py").write_text(
        "import numpy as np\nfrom fl import FedAvgRecipe, SimEnv\n"
        "recipe = FedAvgRecipe(name='stuck', min_clients=2, initial_model={'w': np.zeros(1)},"
        " train_script='client.py')\n"
        f"recipe.execute(SimEnv(num_clients=2, workspace_root={str(tmp_path / 'runs')!r}))\n"
    )
    process = subprocess.Popen([sys.executable, tmp_path / "job.py"], stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 30
        while len(pids := list(tmp_path.glob("runs/*/*/pid"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        children = [int(path.read_text()) for path in pids]
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(15) != 0
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
        assert '"aborted"' in next(tmp_path.glob("runs/*/job.json")).read_text()
    finally:
        process.kill()
        process.communicate()


def test_a_killed_client_is_named(tmp_path: Path) -> None:
    script = "import os\nfrom fl import client as flare\nflare.init()\nflare.receive()\nos.kill(os.getpid(), 9)\n"
    run = recipe_of(tmp_path, script).execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    with pytest.raises(JobFailed) as failure:
        run.get_result()
    assert any("was killed by SIGKILL" in reason for reason in failure.value.reasons)


def test_each_client_finds_its_own_data(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "number.txt").write_text("3" if name == "a" else "5")
    script = (
        "import numpy as np\nfrom fl import client as flare\nfrom fl.errors import RecipeUnusable\nflare.init()\n"
        "number = float(flare.data_path('number.txt').read_text())\n"
        "for bad in ('../a/number.txt', 'other.txt', ''):\n"
        "    try:\n        flare.data_path(bad)\n        raise SystemExit('found ' + bad)\n"
        "    except RecipeUnusable as error:\n        print(error)\n"
        "while flare.is_running():\n    flare.receive()\n"
        "    flare.send(flare.FLModel(params={'w': np.full(3, number, dtype=np.float32)}))\n"
    )
    env = SimEnv(clients=["a", "b"], data=tmp_path / "data", workspace_root=tmp_path / "runs")
    run = recipe_of(tmp_path, script).execute(env)
    assert load_file(run.get_result() / "model.safetensors")["w"].tolist() == [4, 4, 4]
    assert "It has: number.txt." in (run.get_result() / "a" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "Hello World"}, "name"),
        ({"num_rounds": 0}, "num_rounds"),
        ({"initial_model": None}, "exactly one"),
        ({"model": {}}, "exactly one"),
        ({"initial_model": {}}, "no tensor"),
        ({"initial_model": 7}, "a int is not a model"),
        ({"initial_model": {"class_path": "no.such.Thing"}}, "no.such.Thing"),
        ({"train_script": "nowhere.py"}, "there is no file nowhere.py"),
        ({"train_args": "'open"}, "train_args"),
        ({"params_type": "HALF"}, "params_type"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(RecipeUnusable, match=complaint):
        recipe_of(tmp_path, ADDS_ONE, **changes)


def test_wrong_environments_are_named(tmp_path: Path) -> None:
    for arguments in (
        {},
        {"num_clients": 0},
        {"clients": ["a", "a"]},
        {"clients": ["../a"]},
        {"clients": ["a"], "num_clients": 2},
    ):
        with pytest.raises(RecipeUnusable):
            SimEnv(**arguments)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(RecipeUnusable, match="not a folder"):
        SimEnv(num_clients=1, data=tmp_path / "none")
    with pytest.raises(RecipeUnusable, match="needs 2 clients"):
        recipe_of(tmp_path, ADDS_ONE).execute(SimEnv(num_clients=1, workspace_root=tmp_path))


def test_importing_fl_and_its_client_is_light() -> None:
    code = "import sys, fl, fl.client; print([m for m in ('torch', 'grpc', 'tensorboard', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
