"""SCAFFOLD at a site: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1, lines 6 to 13.

    y <- x;  K times:  y <- y - eta_l (g_i(y) - c_i + c)
    c_i+ <- c_i - c + (x - y) / (K eta_l)                       (option II)
    send (y - x, c_i+ - c_i)

    variates = ControlVariates()
    while flare.is_running():
        variates.receive(flare.receive())
        network.load_state_dict(variates.params)
        ...for each of K steps: loss.backward(); variates.correct(network); optimizer.step()   # SGD of rate eta_l
        flare.send(variates.answer(network.state_dict(), steps=K, lr=eta_l, metrics=...))

It works on NumPy arrays and torch tensors alike; the site's own c_i stays in the script, from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fl.errors import RecipeUnusable
from fl.model import FLModel, ParamsType

if TYPE_CHECKING:
    import torch

CONTROL: Final = "scaffold.control/"
"""Before the name of a parameter: the name of its control variate, which travels beside it."""


class ControlVariates:
    """A site's control variates c_i, and the server's model x and control variates c of the round that is on."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        """x: the global model, without control variates."""
        self._server: dict[str, Any] = {}
        self._own: dict[str, Any] = {}

    def receive(self, model: FLModel | None) -> None:
        """Take the round's model, with the server's control variates. Raises RecipeUnusable if it carries none."""
        params = {} if model is None else model.params
        self.params = {name: value for name, value in params.items() if not name.startswith(CONTROL)}
        self._server = {name.removeprefix(CONTROL): value for name, value in params.items() if name.startswith(CONTROL)}
        if not self._server:
            raise RecipeUnusable("the model carries no control variates", where="script", do="Use ScaffoldRecipe.")
        for name, value in self._server.items():
            self._own.setdefault(name, value * 0)

    def correction(self, name: str) -> Any:
        """c - c_i of one parameter: what is added to its gradient."""
        return self._server[name] - self._own[name]

    def correct(self, network: torch.nn.Module) -> None:
        """Add the correction to the gradient of every trainable parameter of a torch module."""
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                parameter.grad += self.correction(name).to(parameter.device)

    def answer(
        self, params: Mapping[str, Any], *, steps: int, lr: float, metrics: Mapping[str, float] | None = None
    ) -> FLModel:
        """The update after `steps` steps of plain SGD of rate `lr` from x to `params`; c_i becomes c_i+.

        Raises ValueError unless both are above 0.
        """
        if not (steps > 0 and lr > 0):
            raise ValueError(f"{steps} steps at a rate of {lr} are no training")
        update: dict[str, Any] = {name: params[name] - value for name, value in self.params.items()}
        for name, server in self._server.items():
            change = -server - update[name] / (steps * lr)  # c_i+ - c_i
            update[CONTROL + name] = _like(change, server)
            self._own[name] = self._own[name] + update[CONTROL + name]
        update = {name: _like(value, self.params.get(name, value)) for name, value in update.items()}
        return FLModel(params=update, params_type=ParamsType.DIFF, metrics=dict(metrics or {}))


def _like(value: Any, pattern: Any) -> Any:
    """`value` in the dtype of `pattern`: arithmetic with Python numbers may have widened it."""
    return value.to(pattern.dtype) if hasattr(value, "to") else value.astype(pattern.dtype)
