"""PocEnv for a job of devices: real gateways, devices that attest them, the same recipe as in SimEnv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from fl import DeviceManagerConfig, EdgeFedBuffRecipe, ModelManagerConfig, PocEnv, SimulationConfig
from fl.errors import JobAborted

pytest.importorskip("executorch")
pytestmark = pytest.mark.long
W = np.array([[1.0, -1.0, 0.5]], np.float32)


def examples(device: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    inputs = np.random.default_rng(device).standard_normal((16, 3)).astype(np.float32)
    return inputs, (inputs @ W.T > 0).astype(np.int64)[:, 0]


def recipe(**changes: Any) -> EdgeFedBuffRecipe:
    torch.manual_seed(1)
    return EdgeFedBuffRecipe(
        "edge-poc",
        model=torch.nn.Linear(3, 2),
        input_shape=(8, 3),
        output_shape=(8,),
        device_training_params={"epoch": 2, "lr": 0.5},
        model_manager_config=ModelManagerConfig(
            num_updates_for_model=4, max_model_version=4, global_lr=1.0, update_timeout=0.2
        ),
        device_manager_config=DeviceManagerConfig(device_selection_size=8, initial_min_client_num=2),
        **{"simulation_config": SimulationConfig(examples, num_devices=4, num_workers=2), **changes},
    )


def test_devices_train_through_the_gateways_of_poc_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = SimulationConfig(lambda device: examples(device), num_devices=4, num_workers=2, job_timeout=1.0)
    with PocEnv(["gate-1", "gate-2"], workspace_root=tmp_path / "runs") as env:
        run = recipe().execute(env)
        result = run.get_result(timeout=120)
        assert run.get_status() == "finished"
        lines = run.logs()
        assert {"gate-1 has joined", "gate-2 has joined"} <= set(lines)
        assert [row["mean"]["updates"] >= 4 for row in run.metrics()] == [True] * 3
        model, inputs = load_file(result / "model.safetensors"), np.random.default_rng(99).standard_normal((200, 3))
        said = (inputs @ model["weight"].T + model["bias"]).argmax(axis=1)
        assert (said == (inputs @ W.T > 0)[:, 0]).mean() > 0.9

        run = recipe(simulation_config=gone).execute(env)  # the same services: the bundle is the same
        with pytest.raises(JobAborted):
            run.get_result(timeout=120)
    assert not list(tmp_path.glob("sealwright-*"))
