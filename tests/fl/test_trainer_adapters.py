"""Trainers in federated scripts: the loop of an adapter, and Lightning's and Hugging Face's own where installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fl import FedAvgRecipe, SimEnv, add_cross_site_evaluation
from fl.errors import RecipeUnusable
from fl.local.huggingface import patch as patch_huggingface
from fl.local.lightning import patch as patch_lightning
from fl.local.trainer_round import numbers
from fl.recipes.recipe import Recipe

TRAINER = """
import torch
from fl import client as flare
from fl.local.huggingface import patch


class State:
    global_step = 0


class Output:
    metrics = {"train_loss": 2.0}


class Trainer:
    # A trainer in the form of Hugging Face's: `evaluate` and `train` on `model`; `train` evaluates in its middle.
    def __init__(self, model):
        self.model, self.optimizer, self.lr_scheduler, self.state = model, "old", "old", State()

    def evaluate(self):
        return {"eval_mean": float(self.model.weight.detach().mean()), "eval_note": "words"}

    def train(self):
        assert self.optimizer is None
        with torch.no_grad():
            self.model.weight += 1
        self.optimizer, self.state.global_step = "new", 5
        assert self.evaluate()["eval_mean"] == float(self.model.weight.detach().mean())
        return Output()


torch.manual_seed(0)
trainer = Trainer(torch.nn.Linear(2, 1, bias=False))
patch(trainer)
rounds = 0
while flare.is_running():
    rounds += 1
    trainer.evaluate()
    trainer.train()
    trainer.train()  # the task is answered: nothing happens
print("tasks", rounds)
"""
LIGHTNING = """
import logging

import pytorch_lightning as lightning
import torch
from fl import client as flare
from fl.local.lightning import patch
from network import Network

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
data = torch.utils.data.TensorDataset(torch.randn(32, 2), torch.randn(32, 1))
loader = torch.utils.data.DataLoader(data, batch_size=8)
trainer = lightning.Trainer(
    max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
    enable_model_summary=False,
)
patch(trainer)
network = Network()
while flare.is_running():
    received = flare.receive()
    trainer.validate(network, loader, verbose=False)
    trainer.fit(network, loader)
print("steps", trainer.global_step)
"""
LIGHTNING_NETWORK = """
import pytorch_lightning as lightning
import torch


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""
HUGGING_FACE = """
import torch
from fl import client as flare
from fl.local.huggingface import patch
from network import Network, rows
from transformers import Trainer, TrainingArguments

arguments = TrainingArguments(
    output_dir="out", num_train_epochs=1, per_device_train_batch_size=8, report_to=[], save_strategy="no",
    logging_strategy="no", use_cpu=True, disable_tqdm=True,
)
trainer = Trainer(model=Network(), args=arguments, train_dataset=rows(32), eval_dataset=rows(16))
patch(trainer)
while flare.is_running():
    trainer.evaluate()
    trainer.train()
print("steps", trainer.state.global_step)
"""
HUGGING_FACE_NETWORK = """
import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels=None):
        found = self.layer(x)
        return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}


def rows(count):
    return [{"x": torch.randn(2), "labels": torch.randn(1)} for _ in range(count)]
"""


def make(folder: Path, script: str, network: str | None, model: object) -> Recipe:
    code = folder / "code"
    code.mkdir()
    (code / "client.py").write_text(script)
    if network is not None:
        (code / "network.py").write_text(network)
    return FedAvgRecipe(
        name="trainer", min_clients=2, num_rounds=2, initial_model=model, train_script=str(code / "client.py")
    )  # fmt: skip


def test_the_loop_of_an_adapter_answers_every_task_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    start = float(model.weight.detach().mean())
    recipe = make(tmp_path, TRAINER, None, model)
    add_cross_site_evaluation(recipe)
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    record = json.loads((run.get_result() / "job.json").read_text())
    assert [row["metrics"]["eval_mean"] for row in record["rounds"]] == pytest.approx([start, start + 1], abs=1e-4)
    assert record["rounds"][0]["updates"]["site-1"]["weight"] == 5
    assert float(load_file(run.get_result() / "model.safetensors")["weight"].mean()) == pytest.approx(start + 2)
    for row in record["cross_site_evaluation"].values():
        assert row.keys() == {"global", "site-1", "site-2"}
        assert row["site-1"]["eval_mean"] == pytest.approx(start + 2, abs=1e-4)
    assert run.logs(grep="tasks") == ["site-1: tasks 6", "site-2: tasks 6"]


def test_a_lightning_trainer_trains_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    code = tmp_path / "module"
    code.mkdir()
    (code / "lightning_network.py").write_text(LIGHTNING_NETWORK)
    monkeypatch.syspath_prepend(code)
    from lightning_network import Network  # type: ignore[import-not-found]

    recipe = make(tmp_path, LIGHTNING, LIGHTNING_NETWORK, Network())
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "finished", run.logs()
    assert [row["mean"].keys() for row in run.metrics()] == [{"val_loss"}] * 2
    assert run.logs(grep="steps 8")  # two rounds of one epoch of four batches


def test_a_hugging_face_trainer_trains_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    code = tmp_path / "module"
    code.mkdir()
    (code / "hugging_face_network.py").write_text(HUGGING_FACE_NETWORK)
    monkeypatch.syspath_prepend(code)
    from hugging_face_network import Network  # type: ignore[import-not-found]

    recipe = make(tmp_path, HUGGING_FACE, HUGGING_FACE_NETWORK, Network())
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path / "runs"))
    assert run.get_status() == "finished", run.logs()
    assert all("eval_loss" in row["mean"] for row in run.metrics())
    assert run.logs(grep="steps 4")


def test_what_is_no_trainer_is_refused() -> None:
    for patch in (patch_lightning, patch_huggingface):
        with pytest.raises(RecipeUnusable, match=r"no .* Trainer"):
            patch(object())


def test_only_finite_numbers_are_metrics() -> None:
    found = numbers({"a": torch.tensor(1.5), "b": "words", "c": float("nan"), "d": 2, "e": None, "f": [1, 2]})
    assert found == {"a": 1.5, "d": 2.0}
    assert len(numbers({str(number): 1.0 for number in range(100)})) == 64
