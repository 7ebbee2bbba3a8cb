"""FedProx at a site: the proximal term of Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2.

    h(w; w_t) = F(w) + mu/2 ||w - w_t||^2

A script adds the term to its loss, or, where it works with gradients, the term's gradient to its own:

    received = flare.receive()
    proximal = FedProxLoss(received.meta["fedprox_mu"])
    loss = criterion(network(x), y) + proximal(network, received.params)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class FedProxLoss:
    """The proximal term with its weight `mu` >= 0."""

    def __init__(self, mu: float) -> None:
        """Raises ValueError if `mu` is negative."""
        if not mu >= 0:
            raise ValueError(f"mu is {mu}, which is not at least 0")
        self.mu = float(mu)

    def __call__(self, network: torch.nn.Module, received: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """mu/2 ||w - w_t||^2 over the network's trainable parameters: a scalar tensor to be added to the loss.

        `received` holds the global model's parameters by the names of `network.named_parameters()`.
        """
        import torch

        distances = [
            torch.sum((parameter - received[name].to(parameter.device)) ** 2)
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]
        return self.mu / 2 * torch.stack(distances).sum() if distances else torch.zeros(())

    def gradient(self, weights: Any, received: Any) -> Any:
        """The term's gradient mu (w - w_t), for arrays (or tensors) of one parameter."""
        return self.mu * (weights - received)
