"""A small network for images of 8 x 8 pixels."""

from __future__ import annotations

import torch


class Network(torch.nn.Module):
    """64 pixels, one hidden layer, 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores [images, 10] of pixels [images, 64] from 0 to 1."""
        scores: torch.Tensor = self.layers(pixels)
        return scores
