"""Scripts in the way of NVIDIA FLARE's recipes and client API run as they are; what has no stand-in says so by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_world import SITES, FederationWorld, found_federation
from safetensors.numpy import load_file

from fl.compat import NotSupported, missing
from fl.jobs.bundle import parse_bundle
from fl.transport.memory import SealedMemory

TORCH_MODEL = """
import torch


class SimpleNetwork(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, width)

    def forward(self, x):
        return self.layer(x)
"""
TORCH_CLIENT = """
import argparse

import torch
from model import SimpleNetwork

import nvflare.client as flare
from nvflare.client.tracking import SummaryWriter

parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=4)
batch_size = parser.parse_args().batch_size
flare.init()
site = flare.system_info()["site_name"]
writer = SummaryWriter()
net = SimpleNetwork()
last = None
while flare.is_running():
    received = flare.receive()
    if flare.is_submit_model():
        flare.send(flare.FLModel(params=last))
        continue
    net.load_state_dict(received.params)
    accuracy = float(net.layer.bias.mean())
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"accuracy": accuracy}))
        continue
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += batch_size
    writer.add_scalar(tag="train_loss", scalar=1.5, global_step=received.current_round)
    last = {name: value.clone() for name, value in net.state_dict().items()}
    flare.send(
        flare.FLModel(params=last, metrics={"accuracy": accuracy}, meta={"NUM_STEPS_CURRENT_ROUND": 3})
    )
"""
TORCH_JOB = """
import argparse
import sys

from model import SimpleNetwork

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv, add_experiment_tracking
from nvflare.recipe.utils import add_cross_site_evaluation

parser = argparse.ArgumentParser()
parser.add_argument("--n_clients", type=int, default=2)
parser.add_argument("--dict", action="store_true")
arguments = parser.parse_args()
recipe = FedAvgRecipe(
    name="hello-PT",
    min_clients=arguments.n_clients,
    num_rounds=2,
    model={"class_path": "model.SimpleNetwork", "args": {"width": 4}} if arguments.dict else SimpleNetwork(),
    train_script="client.py",
    train_args="--batch_size 1",
    launch_external_process=False,
    client_memory_gc_rounds=0,
)
add_experiment_tracking(recipe, tracking_type="tensorboard")
add_cross_site_evaluation(recipe)
run = recipe.execute(SimEnv(num_clients=arguments.n_clients, workspace_root="runs"))
print("Job Status is:", run.get_status())
print("Result:", run.get_result())
"""
NUMPY_CLIENT = """
import argparse

import numpy as np

import nvflare.client as flare
from nvflare.app_common.np.constants import NPConstants
from nvflare.client.tracking import SummaryWriter

parser = argparse.ArgumentParser()
parser.add_argument("--update_type", choices=["full", "diff"], default="full")
update_type = parser.parse_args().update_type
flare.init()
writer = SummaryWriter()
while flare.is_running():
    received = flare.receive()
    array = received.params[NPConstants.NUMPY_KEY]
    new = array + 1
    metrics = {"weight_mean": np.mean(new)}
    writer.add_scalar(tag="weight_mean", scalar=metrics["weight_mean"], global_step=received.current_round)
    diff = update_type == "diff"
    flare.send(
        flare.FLModel(
            params={NPConstants.NUMPY_KEY: new - array if diff else new},
            params_type=flare.ParamsType.DIFF if diff else flare.ParamsType.FULL,
            metrics=metrics,
            current_round=received.current_round,
        )
    )
"""
NUMPY_JOB = """
import sys

from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv, add_experiment_tracking

recipe = NumpyFedAvgRecipe(
    name="hello-numpy",
    min_clients=2,
    num_rounds=3,
    model=[[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    train_script="client.py",
    train_args=f"--update_type {sys.argv[1]}",
)
add_experiment_tracking(recipe, tracking_type="tensorboard")
run = recipe.execute(SimEnv(num_clients=2, workspace_root="runs"))
print(run.get_result())
"""


def seal(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance.cli", "job", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def torch_job(folder: Path) -> None:
    for name, text in (("model.py", TORCH_MODEL), ("client.py", TORCH_CLIENT), ("job.py", TORCH_JOB)):
        (folder / name).write_text(text)


def only_run(folder: Path) -> Path:
    return next((folder / "runs").iterdir())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FederationWorld:
    return found_federation(tmp_path_factory.mktemp("compat"))


@pytest.fixture(scope="module")
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


@pytest.mark.parametrize("words", [(), ("--dict",)])
def test_a_pytorch_job_runs_without_a_change(words: tuple[str, ...], tmp_path: Path) -> None:
    torch_job(tmp_path)
    done = seal(tmp_path, "run", "--compat", "nvflare", "job.py", "--n_clients", "2", *words)
    assert done.returncode == 0, done.stderr
    assert "Job Status is: finished" in done.stdout
    result = only_run(tmp_path)
    record = json.loads((result / "job.json").read_text())
    bias = float(load_file(result / "model.safetensors")["layer.bias"].mean())
    assert record["cross_site_evaluation"]["site-1"]["global"]["accuracy"] == pytest.approx(bias, rel=1e-4)
    assert record["best"]["round"] == 1
    assert {value["train_loss"] for value in record["values"]} == {1.5}
    assert list((result / "events").glob("events.*"))


@pytest.mark.parametrize("update_type", ["full", "diff"])
def test_a_numpy_job_runs_without_a_change(update_type: str, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(NUMPY_CLIENT)
    (tmp_path / "job.py").write_text(NUMPY_JOB)
    done = seal(tmp_path, "run", "--compat", "nvflare", "job.py", update_type)
    assert done.returncode == 0, done.stderr
    found = load_file(only_run(tmp_path) / "model.safetensors")["numpy_key"]
    assert found.tolist() == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]


def test_its_bundle_runs_in_real_sandboxes(world: FederationWorld, server: str, tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(NUMPY_CLIENT)
    (tmp_path / "job.py").write_text(NUMPY_JOB)
    done = seal(tmp_path, "run", "--compat", "nvflare", "job.py", "full", "--export", "--export-dir", "out")
    assert done.returncode == 0, done.stderr
    bundle = parse_bundle((tmp_path / "out" / "job.bundle").read_bytes())
    world.approve(bundle)
    with (
        world.site(server, SITES[0], number=1),
        world.site(server, SITES[1], number=1),
        world.client(server) as client,
        SealedMemory.of((tmp_path / "out" / "model.safetensors").read_bytes()) as model,
    ):
        job = client.submit(bundle, model, roster=None, recipients=["acme-pharma/ada"])
        list(client.watch(job, timeout=60))
        result = client.download(job, tmp_path / "result", ledgers=None)
    assert load_file(result / "model.safetensors")["numpy_key"].tolist() == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]


LR_CLIENT = """
import argparse

import numpy as np

from nvflare import client as flare
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.np.constants import NPConstants
from nvflare.client.tracking import SummaryWriter

parser = argparse.ArgumentParser()
parser.add_argument("--data_root")
root = parser.parse_args().data_root
flare.init()
table = np.load(f"{root}/{flare.get_site_name()}.npy")
design, labels = np.column_stack([np.ones(len(table)), table[:, :-1]]), table[:, -1:]
writer = SummaryWriter()
while flare.is_running():
    received = flare.receive()
    theta = received.params[NPConstants.NUMPY_KEY]
    p = 1 / (1 + np.exp(-design @ theta))
    writer.add_scalar("accuracy", float(((p > 0.5) == labels).mean()), received.current_round)
    hessian = (design.T * (p * (1 - p))[:, 0]) @ design
    answer = FLModel(params={"gradient": design.T @ (labels - p), "hessian": hessian}, params_type=ParamsType.FULL)
    answer.meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] = len(table)
    flare.send(answer)
"""
LR_JOB = """
import sys

from nvflare.app_common.np.recipes.lr.fedavg import FedAvgLrRecipe
from nvflare.client.config import ExchangeFormat, TransferType
from nvflare.recipe import SimEnv

assert TransferType.DIFF == "DIFF" and ExchangeFormat.NUMPY == "numpy"
recipe = FedAvgLrRecipe(
    num_rounds=8,
    damping_factor=1.0,
    num_features=3,
    train_script="client.py",
    train_args=f"--data_root {sys.argv[1]}",
)
print(recipe.execute(SimEnv(num_clients=2, num_threads=2, workspace_root="runs")).get_result())
"""


def test_a_job_of_newton_s_method_runs_without_a_change(tmp_path: Path) -> None:
    """Two sites of unequal size: the weights are those of the pooled records, to the last digits of a solver."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    features, labels = load_breast_cancer(return_X_y=True)
    features = features[:, [1, 4, 8]]
    features = (features - features.mean(0)) / features.std(0)
    table = np.column_stack([features, labels])
    np.save(tmp_path / "site-1.npy", table[:120])
    np.save(tmp_path / "site-2.npy", table[120:])
    (tmp_path / "client.py").write_text(LR_CLIENT)
    (tmp_path / "job.py").write_text(LR_JOB)
    done = seal(tmp_path, "run", "--compat", "nvflare", "job.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    pooled = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(features, labels)
    found = load_file(only_run(tmp_path) / "model.safetensors")["weights"]
    assert np.allclose(found, [*pooled.coef_[0], pooled.intercept_[0]], rtol=1e-4)


@pytest.mark.parametrize("module", ["hf", "lightning"])
def test_a_trainer_s_client_api_is_the_same_with_patch(module: str) -> None:
    import importlib

    from fl.compat.nvflare import client
    from fl.errors import RecipeUnusable

    found = importlib.import_module(f"fl.compat.nvflare.client.{module}")
    for name in client.__all__:
        assert getattr(found, name) is getattr(client, name)
    with pytest.raises(NotSupported, match=rf"nvflare\.client\.{module}\.patch\(params_scope="):
        found.patch(object(), params_scope="adapter")
    with pytest.raises(RecipeUnusable, match=r"no .* Trainer"):
        found.patch(object(), local_epochs=None)
    with pytest.raises(NotSupported, match=r"nvflare\.client\.get_config"):
        _ = found.get_config


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from nvflare.app_opt.tf.recipes.cyclic import CyclicRecipe", "nvflare.app_opt.tf"),
        ("from nvflare.recipe import add_final_global_evaluation", "nvflare.recipe.add_final_global_evaluation"),
        ("import nvflare.client as flare; flare.get_config()", "nvflare.client.get_config"),
        ("from nvflare import FedJob", "nvflare.FedJob"),
        ("from nvflare.apis.fl_constant import FLMetaKey; FLMetaKey.SITE_NAME", "FLMetaKey.SITE_NAME"),
        ("from nvflare.apis.fl_constant import ReturnCode", "nvflare.apis.fl_constant.ReturnCode"),
        ("from nvflare.app_common.logging.job_log_receiver import JobLogReceiver", "nvflare.app_common.logging"),
        ("from nvflare.recipe.fedstats import FedStatsRecipe", "nvflare.recipe.fedstats"),
        ("from nvflare.app_opt.flower.recipe import FlowerRecipe", "nvflare.app_opt.flower"),
        (
            "from nvflare.app_common.np.recipes.lr import FedAvgLrRecipe as R; R(num_features=1, initial_ckpt='x.npy')",
            "nvflare FedAvgLrRecipe(initial_ckpt=...)",
        ),
        (
            "from nvflare.recipe import SimEnv; SimEnv(num_clients=2, extra={'x': 1})",
            "nvflare SimEnv(extra=...)",
        ),
        (
            "from nvflare.app_opt.pt.recipes import FedAvgRecipe as R; R(model=[1], exclude_vars='b.*')",
            "nvflare FedAvgRecipe(exclude_vars=...)",
        ),
        (
            "from nvflare.app_opt.pt.recipes import FedOptRecipe as R; R(optimizer_args={'path': 'torch.optim.LBFGS'})",
            "torch.optim.LBFGS",
        ),
    ],
)
def test_what_is_not_supported_says_so_by_name(line: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(line + "\n")
    done = seal(tmp_path, "run", "--compat", "nvflare", "job.py")
    assert done.returncode == 2
    assert name in done.stderr
    assert "is not supported here" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_optimizers_of_fedopt_are_ours(tmp_path: Path) -> None:
    from fl.compat.nvflare.training import FedOptRecipe

    (tmp_path / "client.py").write_text("")
    recipe = FedOptRecipe(
        min_clients=1,
        model=[1.0],
        train_script=str(tmp_path / "client.py"),
        optimizer_args={"path": "torch.optim.Adam", "args": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.01}},
    )
    options = recipe.settings.options
    assert options is not None
    assert options.model_dump() == {
        "recipe": "fedopt", "optimizer": "adam", "lr": 0.1, "momentum": 0.0, "beta1": 0.8, "beta2": 0.9, "tau": 0.01
    }  # fmt: skip


def test_other_systems_and_missing_scripts_are_refused(tmp_path: Path) -> None:
    assert "no stand-ins for flwr" in seal(tmp_path, "run", "--compat", "flwr", "job.py").stderr
    assert "there is no file job.py" in seal(tmp_path, "run", "job.py").stderr
    (tmp_path / "job.py").write_text("raise SystemExit(7)")
    assert seal(tmp_path, "run", "job.py").returncode == 7
    with pytest.raises(NotSupported, match=r"nvflare\.x\.y"):
        missing("fl.compat.nvflare.x", "y")
