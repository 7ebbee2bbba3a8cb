"""The recipes of training, with FLARE's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fl.compat import NotSupported
from fl.compat.nvflare.arguments import adapt, ours
from fl.recipes import cyclic, evaluation, fedavg, fedopt, fedprox, newton, scaffold

OPTIMIZERS: Final = {"torch.optim.SGD": "sgd", "torch.optim.Adam": "adam"}


class FedAvgRecipe(fedavg.FedAvgRecipe):
    """Federated averaging. The best model is that of the best `accuracy`, unless `key_metric` says otherwise."""

    def __init__(self, **given: Any) -> None:
        """Raises NotSupported, RecipeUnusable."""
        super().__init__(**ours("FedAvgRecipe", {"key_metric": _metric(given), **given}, default="fedavg"))
        adapt(self)


class FedProxRecipe(fedprox.FedProxRecipe):
    """Federated averaging with a proximal term."""

    def __init__(self, *, fedprox_mu: float = 0.01, **given: Any) -> None:
        """Raises NotSupported, RecipeUnusable."""
        given = {"key_metric": _metric(given), **given}
        super().__init__(mu=fedprox_mu, **ours("FedProxRecipe", given, default="fedprox"))
        adapt(self)


class FedOptRecipe(fedopt.FedOptRecipe):
    """Federated averaging with an optimizer at the server."""

    def __init__(self, *, optimizer_args: Mapping[str, Any] | None = None, **given: Any) -> None:
        """Raises NotSupported for an optimizer that is not SGD or Adam, or for its other arguments; RecipeUnusable."""
        super().__init__(**_optimizer(optimizer_args or {}), **ours("FedOptRecipe", given, default="fedopt"))
        adapt(self)


class ScaffoldRecipe(scaffold.ScaffoldRecipe):
    """SCAFFOLD; its scripts use `fl.local.scaffold.ControlVariates`."""

    def __init__(self, **given: Any) -> None:
        """Raises NotSupported, RecipeUnusable."""
        arguments = ours("ScaffoldRecipe", given, default="scaffold")
        arguments.pop("params_type", None)
        super().__init__(**arguments)
        adapt(self)


class CyclicRecipe(cyclic.CyclicRecipe):
    """One site after the other."""

    def __init__(self, *, min_clients: int = 2, **given: Any) -> None:
        """Raises NotSupported, RecipeUnusable."""
        super().__init__(min_clients=min_clients, **ours("CyclicRecipe", given, default="cyclic"))
        adapt(self)


class FedAvgLrRecipe(newton.FedAvgLrRecipe):
    """Logistic regression by Newton's method; the result's `weights` have the intercept last."""

    def __init__(
        self, *, num_features: int, damping_factor: float = 0.8, min_clients: int = 2, num_rounds: int = 5, **given: Any
    ) -> None:
        """Raises NotSupported, RecipeUnusable."""
        if given.get("initial_ckpt") is not None:
            raise NotSupported("nvflare FedAvgLrRecipe(initial_ckpt=...)")
        given = {**given, "min_clients": min_clients, "num_rounds": num_rounds}
        arguments = ours(
            "FedAvgLrRecipe", {name: value for name, value in given.items() if value is not None}, default="lr"
        )
        super().__init__(num_features=num_features, damping_factor=damping_factor, **arguments)
        adapt(self)


class FedEvalRecipe(evaluation.FedEvalRecipe):
    """Evaluate one model at every site."""

    def __init__(self, *, eval_script: str, eval_args: str = "", eval_ckpt: str | None = None, **given: Any) -> None:
        """Raises NotSupported, RecipeUnusable."""
        given = {**given, "train_script": eval_script, "train_args": eval_args, "initial_ckpt": eval_ckpt}
        super().__init__(**ours("FedEvalRecipe", given, default="eval"))
        adapt(self)


class NumpyCrossSiteEvalRecipe(evaluation.FedEvalRecipe):
    """Evaluate a model, and those of the sites, at every site."""

    def __init__(
        self, *, min_clients: int = 2, eval_script: str | None = None, eval_args: str = "", **given: Any
    ) -> None:
        """Raises NotSupported without a script, RecipeUnusable."""
        if eval_script is None:
            raise NotSupported("nvflare NumpyCrossSiteEvalRecipe(eval_script=None)")
        given = {**given, "train_script": eval_script, "train_args": eval_args, "min_clients": min_clients}
        super().__init__(**ours("NumpyCrossSiteEvalRecipe", given, default="numpy-cross-site-eval"))
        evaluation.add_cross_site_evaluation(self)
        adapt(self)


def _metric(given: Mapping[str, Any]) -> str | None:
    """FLARE judges by `accuracy` where nothing is said."""
    return None if given.get("stop_cond") else "accuracy"


def _optimizer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    path = arguments.get("path") or arguments.get("class_path") or "torch.optim.SGD"
    if path not in OPTIMIZERS:
        raise NotSupported(f"nvflare FedOptRecipe(optimizer_args={{'path': {path!r}}})")
    found: dict[str, Any] = {"optimizer": OPTIMIZERS[path], "lr": 1.0, "momentum": 0.0}
    for name, value in (arguments.get("args") or {}).items():
        if name == "betas":
            found["beta1"], found["beta2"] = value
        elif name in {"lr", "momentum"}:
            found[name] = value
        elif name == "eps":
            found["tau"] = value
        else:
            raise NotSupported(f"nvflare FedOptRecipe(optimizer_args={{'args': {{{name!r}: ...}}}})")
    return found
