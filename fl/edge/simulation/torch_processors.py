"""Virtual devices that train a recipe's network: by PyTorch, or by ExecuTorch's runtime on the exported graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fl.edge.contract import Tensors
from fl.edge.device_model import DeviceModel
from fl.edge.kits.python.data import ArrayDataset
from fl.edge.kits.python.trainer import ExecuTorchTrainer, training_params
from fl.edge.simulation.population import Devices
from fl.edge.simulation.processors import DataOf


class _OneByOne(ABC):
    """Trains device after device, each on its examples in an order that follows from its number and the version."""

    def __init__(self, data_of: DataOf) -> None:
        self._data_of = data_of

    def setup(self) -> None:
        """One core is one worker's."""
        torch.set_num_threads(1)

    def shutdown(self) -> None:  # noqa: B027 - most have nothing to do
        """Nothing is to be done."""

    def train(self, devices: Devices, model: Tensors, version: int) -> tuple[Tensors, npt.NDArray[np.float64]]:
        """See TaskProcessor."""
        own = {name: np.array(array, dtype=np.float32) for name, array in model.items()}
        differences: list[Mapping[str, npt.NDArray[np.float32]]] = []
        weights = []
        for device in devices.tolist():
            inputs, labels = self._data_of(device)
            trained = self._trained(own, ArrayDataset(inputs, labels), np.random.default_rng([device, version]))
            differences.append({name: trained[name] - own[name] for name in own})
            weights.append(float(len(inputs)))
        return {name: np.stack([each[name] for each in differences]) for name in own}, np.array(weights)

    @abstractmethod
    def _trained(self, model: Tensors, dataset: ArrayDataset, rng: np.random.Generator) -> Tensors:
        """The model after one device's training."""


class TorchProcessor(_OneByOne):
    """Stochastic gradient descent by PyTorch, with the settings that a device's trainer takes."""

    def __init__(self, model: DeviceModel, config: Mapping[str, Any], data_of: DataOf) -> None:
        super().__init__(data_of)
        self._model = model
        self._params = training_params(config)

    def _trained(self, model: Tensors, dataset: ArrayDataset, rng: np.random.Generator) -> Tensors:
        net, params = self._model.net, self._params
        net.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in model.items()}, strict=False)
        optimiser = torch.optim.SGD(
            net.parameters(), lr=params.lr, momentum=params.momentum, weight_decay=params.weight_decay
        )
        for _ in range(params.epoch):
            for batch in dataset.batches(params.batch_size, rng):
                optimiser.zero_grad()
                loss, _ = self._model(torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels))
                loss.backward()
                optimiser.step()
        return {name: value.detach().numpy().copy() for name, value in net.state_dict().items() if name in model}


class ExecuTorchProcessor(_OneByOne):
    """What a device does: the exported graph, by the runtime of the Python kit."""

    def __init__(self, graph: bytes, config: Mapping[str, Any], data_of: DataOf) -> None:
        super().__init__(data_of)
        self._graph = graph
        self._config = dict(config)

    def _trained(self, model: Tensors, dataset: ArrayDataset, rng: np.random.Generator) -> Tensors:
        return ExecuTorchTrainer().train(self._graph, self._config, dict(model), dataset, rng, lambda: None)
