"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2.

Each site minimises its own loss plus mu/2 ||w - w_t||^2, which keeps it near the global model w_t however different its
data are or however many steps it takes (`fl.local.fedprox.FedProxLoss` in the script). The server does as in FedAvg.
"""

from __future__ import annotations

from typing import Final, Unpack

from fl.recipes.fedavg import fedavg
from fl.recipes.recipe import TrainingArguments, TrainingRecipe

fedprox: Final = fedavg
"""The server's half is FedAvg's: the term is in the sites' losses."""


class FedProxRecipe(TrainingRecipe):
    """Federated averaging with a proximal term in the sites' losses."""

    def __init__(self, *, mu: float, **training: Unpack[TrainingArguments]) -> None:
        """`mu`: the term's weight, at least 0 (0 is FedAvg). A script finds it as `received.meta["fedprox_mu"]`.

        The other arguments are FedAvgRecipe's. Raises RecipeUnusable with the argument that is wrong.
        """
        super().__init__("fedprox", {"mu": mu}, training)
