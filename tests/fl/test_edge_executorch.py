"""The Python kit on ExecuTorch's own runtime: an exported training graph, trained by devices over TLS."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_world import JOB, found_edge, version_of
from federation_world import now

from fl.edge.kits.python import DeviceSettings, GatewayConnection
from fl.edge.kits.python.data import ArrayDataset, Dataset
from fl.edge.kits.python.trainer import ExecuTorchTrainer, TrainingStopped
from fl.edge.task import DeviceTask
from fl.edge.training_graph import export_training_graph
from fl.tensors import TensorSpec, encode
from policies.charter import Changes
from policies.charter.proposal import files_of
from policies.devices import TaskApproval
from policies.errors import Refused, Unusable

pytest.importorskip("executorch")
pytestmark = pytest.mark.long
SHAPES: Mapping[str, tuple[int, ...]] = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,)}
CONFIG = {"batch_size": 16, "epoch": 40, "lr": 0.2}


def network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


@pytest.fixture(scope="module")
def graph() -> bytes:
    return export_training_graph(
        network(), torch.nn.CrossEntropyLoss(), torch.zeros(16, 4), torch.zeros(16, dtype=torch.int64)
    )


def examples(seed: int, count: int = 64) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return ArrayDataset(inputs, inputs[:, :3].argmax(axis=1).astype(np.int64))


def arrays_of(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}


def accuracy(arrays: Mapping[str, np.ndarray], data: ArrayDataset) -> float:
    net = network()
    net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return float((net(torch.from_numpy(data.inputs)).argmax(dim=1).numpy() == data.labels).mean())


def test_it_trains_as_pytorch_does(graph: bytes) -> None:
    """One epoch of SGD from other weights than the graph was exported with: the same parameters to rounding."""
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    before, data = arrays_of(net), examples(1)
    config = {**CONFIG, "epoch": 1, "momentum": 0.5}

    def trained() -> dict[str, np.ndarray]:
        return ExecuTorchTrainer().train(graph, config, dict(before), data, np.random.default_rng(2), lambda: None)

    found = trained()
    rng = np.random.default_rng(2)
    data.batches(16, rng).__next__()  # the first batch, by which the program makes its parameters
    optimiser = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
    for batch in data.batches(16, rng):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(
            net(torch.from_numpy(batch.inputs)), torch.from_numpy(batch.labels)
        ).backward()
        optimiser.step()
    for name, value in arrays_of(net).items():
        np.testing.assert_allclose(found[name], value, atol=2e-6)
    assert all(np.array_equal(value, found[name]) for name, value in trained().items())


def test_what_it_refuses(graph: bytes) -> None:
    model, data, rng = arrays_of(network()), examples(1), np.random.default_rng(0)
    trainer = ExecuTorchTrainer()
    for config in ({}, {**CONFIG, "lr": "fast"}, {**CONFIG, "epoch": 0}):
        with pytest.raises(Unusable, match="the task's configuration"):
            trainer.train(graph, config, model, data, rng, lambda: None)
    with pytest.raises(Refused, match="parameters are not the model's"):
        trainer.train(graph, CONFIG, {"w": np.zeros(3, np.float32)}, data, rng, lambda: None)
    with pytest.raises(Refused, match="fewer than a batch"):
        trainer.train(graph, CONFIG, model, examples(1, 10), rng, lambda: None)

    def stop() -> None:
        raise TrainingStopped("the battery is low")

    with pytest.raises(TrainingStopped):
        trainer.train(graph, CONFIG, model, data, rng, stop)
    with pytest.raises(Unusable, match="buffers"):
        export_training_graph(torch.nn.BatchNorm1d(4), torch.nn.MSELoss(), torch.zeros(16, 4), torch.zeros(16, 4))


def test_devices_train_an_exported_graph_through_a_gateway(graph: bytes, tmp_path: Path) -> None:
    world = found_edge(tmp_path)
    task = DeviceTask(JOB, "executorch", graph, CONFIG)
    approval = TaskApproval(task=task.digest, job=JOB, expires=now() + timedelta(days=1))
    world.federation.change(Changes(put=files_of([approval])))
    first = arrays_of(network())
    model = encode({name: (TensorSpec("F32", array.shape), array.tobytes()) for name, array in first.items()})
    branch = world.branch(shapes=SHAPES)
    branch.advance([version_of(1, task, model)], {task.digest: task})

    class Own:
        def __init__(self, number: int) -> None:
            self.number = number

        def dataset(self, job: str, config: Mapping[str, Any]) -> Dataset:
            return examples(self.number)

    with world.serving(world.gateway(branch)) as (url, call):
        connection = GatewayConnection(url, timeout=10.0)
        for number in range(3):
            device = world.device(
                connection,
                tmp_path / str(number),
                source=Own(number),
                trainer=ExecuTorchTrainer(),
                settings=DeviceSettings(jobs=(JOB,), capabilities={"os": "linux"}, wait_seconds=0.0),
            )
            for _ in range(4):
                device.step()
            assert world.events[-1][1]["status"] == "OK", world.events[-1]
        connection.close()
        call(lambda _: branch.claims())
        call(lambda _: branch.settle(()))
        (total,) = call(lambda _: branch.take()).versions.values()
    assert total.count == 3
    after = {name: value + (total.sums[name] / total.weight).astype(np.float32) for name, value in first.items()}
    unseen = examples(99, 400)
    assert accuracy(after, unseen) > max(0.8, accuracy(first, unseen) + 0.2)
