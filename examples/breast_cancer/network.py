"""The network that is trained: thirty features of a cell nucleus in, two classes out."""

from __future__ import annotations

import torch
from torch import nn


class Classifier(nn.Module):
    """A small multi-layer perceptron; equal seeds give equal weights."""

    def __init__(self, hidden: int = 16, seed: int = 7) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(features)
        return scores


def standardise(features: torch.Tensor) -> torch.Tensor:
    """Each feature with mean 0 and deviation 1 over these patients: every holder of data scales by its own."""
    return (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)


def accuracy(network: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of patients that the network classifies rightly."""
    with torch.no_grad():
        return float((network(features).argmax(dim=1) == labels).float().mean())


def train_epochs(
    network: nn.Module, features: torch.Tensor, labels: torch.Tensor, *, epochs: int, batch_size: int, seed: int
) -> tuple[int, float]:
    """Train in place; how many steps were taken, and the last epoch's mean loss."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    steps, loss_sum = 0, 0.0
    for _ in range(epochs):
        loss_sum = 0.0
        for batch in torch.randperm(len(labels), generator=order).split(batch_size):
            optimizer.zero_grad()
            loss = loss_of(network(features[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            steps += 1
            loss_sum += float(loss.detach()) * len(batch)
    return steps, loss_sum / len(labels)
