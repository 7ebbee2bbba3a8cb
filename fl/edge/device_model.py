"""DeviceModel: a network with its loss, as devices train it."""

from __future__ import annotations

import torch


class DeviceModel(torch.nn.Module):
    """`net` and the loss of its outputs against labels (cross entropy unless another is given)."""

    def __init__(self, net: torch.nn.Module, loss: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.net = net
        self.loss = torch.nn.CrossEntropyLoss() if loss is None else loss

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the outputs."""
        outputs = self.net(inputs)
        return self.loss(outputs, labels), outputs.detach()
