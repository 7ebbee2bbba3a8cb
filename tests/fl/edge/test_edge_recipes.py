"""Edge recipes by FLARE's names: settings, exported graph, bundle, and SimEnv with devices that PyTorch or ExecuTorch
trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from fl.edge import evaluating
from fl.edge.device_model import DeviceModel
from fl.edge.masks import DeviceMasking, capabilities_of, masking_of
from fl.edge.recipes import GRAPH_FILE, EdgeFedBuffRecipe, ETFedBuffRecipe, SimulationConfig
from fl.edge.settings import DeviceManagerConfig, DevicePrivacy, EvaluatorConfig, ModelManagerConfig
from fl.environments.poc import PocEnv
from fl.environments.sim import SimEnv
from fl.errors import JobFailed, RecipeUnusable
from fl.jobs.bundle import parse_bundle
from fl.jobs.lock import LOCK_FILE, parse_lock
from fl.jobs.settings import FedBuffOptions
from policies.errors import Unusable

BATCH = 8


class Xor(torch.nn.Module):
    """Two inputs, two classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(2, 16)
        self.second = torch.nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def examples(device: int, count: int = 16) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Points around the four corners; the class is whether exactly one coordinate is high."""
    generator = np.random.default_rng(device)
    corners = generator.integers(0, 2, (count, 2))
    inputs = (corners + 0.1 * generator.standard_normal((count, 2))).astype(np.float32)
    return inputs, (corners[:, 0] ^ corners[:, 1]).astype(np.int64)


def arguments(**changes: Any) -> dict[str, Any]:
    inputs, labels = examples(10_000, 200)
    return {
        "job_name": "xor",
        "model_manager_config": ModelManagerConfig(
            num_updates_for_model=10, max_model_version=16, global_lr=1.0, staleness_weight=True
        ),
        "device_manager_config": DeviceManagerConfig(device_selection_size=20),
        "evaluator_config": EvaluatorConfig(custom_dataset={"data": inputs.tolist(), "label": labels.tolist()}),
        "simulation_config": SimulationConfig(examples, num_devices=200, num_workers=2),
        "device_training_params": {"epoch": 3, "lr": 0.5, "batch_size": BATCH},
        "input_shape": (BATCH, 2),
        "output_shape": (BATCH,),
        **changes,
    }


def test_devices_train_a_torch_model_in_a_simulation(tmp_path: Path) -> None:
    recipe = EdgeFedBuffRecipe(model=Xor(), **arguments())
    run = recipe.execute(SimEnv(num_clients=2, workspace_root=tmp_path))
    assert run.get_status() == "finished"
    folder = run.get_result()
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "best_model.safetensors", "job.json", "report.json", "report.html"} <= names
    record = json.loads((folder / "job.json").read_text())
    assert (record["recipe"], record["status"], record["num_rounds"]) == ("fedbuff", "finished", 15)
    accuracies = [row["metrics"]["accuracy"] for row in record["rounds"]]
    assert len(accuracies) == 15
    assert max(accuracies) == record["best"]["accuracy"] > 0.9
    net = Xor()
    net.load_state_dict(load_file(folder / "best_model.safetensors"))
    inputs, labels = examples(10_000, 200)
    reached = (net(torch.from_numpy(inputs)).argmax(1) == torch.from_numpy(labels)).float().mean().item()
    assert reached == pytest.approx(max(accuracies))
    report = json.loads((folder / "report.json").read_text())
    assert report["devices"]["registered"] == 400
    assert run.metrics()[-1]["mean"]["accuracy"] == accuracies[-1]


def test_the_job_ends_early_as_it_is_asked_to(tmp_path: Path) -> None:
    env = SimEnv(num_clients=1, workspace_root=tmp_path)
    run = EdgeFedBuffRecipe(model=Xor(), **arguments(stop_cond="accuracy >= 0.3")).execute(env)
    record = json.loads((run.get_result() / "job.json").read_text())
    assert len(record["rounds"]) < 15
    assert "is reached" in record["reasons"][0]
    lazy = arguments(patience=2, device_training_params={"lr": 1e-9})
    record = json.loads((EdgeFedBuffRecipe(model=Xor(), **lazy).execute(env).get_result() / "job.json").read_text())
    assert record["reasons"] == ["2 evaluations without a better one"]


def test_a_job_whose_devices_fail_fails_with_the_reason(tmp_path: Path) -> None:
    def broken(device: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        raise OSError(f"device {device} has no data")

    recipe = EdgeFedBuffRecipe(model=Xor(), **arguments(simulation_config=SimulationConfig(broken)))
    run = recipe.execute(SimEnv(num_clients=1, workspace_root=tmp_path))
    assert run.get_status() == "failed"
    with pytest.raises(JobFailed, match="has no data"):
        run.get_result()


@pytest.mark.long
def test_the_bundle_holds_graphs_and_data_and_no_code_of_the_author() -> None:
    pytest.importorskip("executorch.exir")
    recipe = EdgeFedBuffRecipe(model=Xor(), **arguments())
    bundle = parse_bundle(recipe.bundle().raw)
    assert set(bundle.files) == {GRAPH_FILE, evaluating.GRAPH_FILE, evaluating.DATA_FILE, LOCK_FILE}
    assert parse_lock(bundle.files[LOCK_FILE]) == {}
    options = bundle.settings.options
    assert isinstance(options, FedBuffOptions)
    assert options.edge.models == arguments()["model_manager_config"]
    assert options.config == {"epoch": 3, "lr": 0.5, "batch_size": BATCH}
    assert bundle.settings.schema_of_model["first.weight"].shape == (16, 2)


@pytest.mark.long
def test_what_runs_on_devices_learns_in_a_simulation_what_pytorch_learns(tmp_path: Path) -> None:
    """The exported graph under ExecuTorch's runtime makes the differences that eager PyTorch makes."""
    pytest.importorskip("executorch.exir")
    one_batch = SimulationConfig(lambda device: examples(device, BATCH), num_devices=100)  # whatever its order
    recipe = ETFedBuffRecipe(device_model=DeviceModel(Xor()), **arguments(simulation_config=one_batch))
    eager = EdgeFedBuffRecipe(device_model=DeviceModel(Xor()), **arguments(simulation_config=one_batch))
    model = {name: value.numpy() for name, value in Xor().state_dict().items()}
    found, expected = (one.processor().train(np.arange(3), model, 1) for one in (recipe, eager))
    np.testing.assert_array_equal(found[1], expected[1])
    for name, stacked in expected[0].items():
        np.testing.assert_allclose(found[0][name], stacked, atol=1e-5)
    short = arguments(
        model_manager_config=ModelManagerConfig(num_updates_for_model=5, max_model_version=4, global_lr=1.0)
    )
    run = ETFedBuffRecipe(device_model=DeviceModel(Xor()), **short).execute(
        SimEnv(num_clients=1, workspace_root=tmp_path)
    )
    assert run.get_status() == "finished"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "model"),
        ({"model": Xor(), "device_model": DeviceModel(Xor())}, "device_model"),
        ({"model": 3}, "torch module"),
        ({"model": torch.nn.BatchNorm1d(2)}, "num_batches_tracked"),
        ({"job_name": "XOR"}, "name"),
        ({"device_training_params": {"lr": -1.0}}, "lr"),
        ({"custom_source_root": "/nowhere"}, "custom_source_root"),
        ({"device_wait_timeout": -1.0}, "device_wait_timeout"),
        ({"stop_cond": "soon"}, "stop_cond"),
        ({"evaluator_config": None, "patience": 1}, "evaluator"),
        ({"device_manager_config": DeviceManagerConfig(device_selection_size=5)}, "num_updates_for_model"),
    ],
)
def test_arguments_that_are_wrong_say_so(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(Unusable) as raised:
        EdgeFedBuffRecipe(**arguments(**{"model": Xor(), **changes}))
    assert named in str(raised.value)


def test_a_masked_job_says_so_in_what_is_approved() -> None:
    """A device bounds by itself what a gateway cannot see: so its task says by how much."""
    settings = EdgeFedBuffRecipe(
        **{**arguments(), "model": Xor()}, secure_aggregation=DeviceMasking(cohort=5, threshold=4), max_norm=2.0
    ).settings
    assert isinstance(settings.options, FedBuffOptions)
    masking = masking_of(settings.options.config)
    assert masking == DeviceMasking(cohort=5, threshold=4, clip_norm=2.0)
    assert capabilities_of(settings.options.config) == {"masks": "1"}
    private = EdgeFedBuffRecipe(
        **{**arguments(), "model": Xor()},
        secure_aggregation=DeviceMasking(),
        privacy=DevicePrivacy(clip_norm=0.5, noise_multiplier=1.0, delta=1e-5),
    ).settings
    assert isinstance(private.options, FedBuffOptions)
    masking = masking_of(private.options.config)
    assert masking is not None
    assert (masking.clip_norm, masking.max_weight) == (0.5, 1.0)


def test_what_only_an_environment_can_tell_is_told(tmp_path: Path) -> None:
    env = SimEnv(num_clients=1, workspace_root=tmp_path)
    with pytest.raises(RecipeUnusable, match="SimulationConfig"):
        EdgeFedBuffRecipe(model=Xor(), **arguments(simulation_config=None)).execute(env)
    with pytest.raises(RecipeUnusable, match="shapes"):
        EdgeFedBuffRecipe(model=Xor(), **arguments(input_shape=None)).bundle()
    own = SimulationConfig(EdgeFedBuffRecipe(model=Xor(), **arguments()).processor())
    with pytest.raises(RecipeUnusable, match="function of a device's number"):
        EdgeFedBuffRecipe(model=Xor(), **arguments(simulation_config=own)).execute(PocEnv(num_clients=2))
    with pytest.raises(RecipeUnusable, match="SimulationConfig"):
        EdgeFedBuffRecipe(model=Xor(), **arguments(simulation_config=None)).execute(PocEnv(num_clients=2))
    with pytest.raises(RecipeUnusable, match="num_workers"):
        SimulationConfig(examples, num_workers=0)
    assert list(tmp_path.iterdir()) == []
