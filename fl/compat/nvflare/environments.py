"""Environments and helpers, with FLARE's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl.compat import NotSupported
from fl.environments import poc, prod, sim
from fl.recipes import evaluation
from fl.recipes.recipe import Recipe
from fl.tracking import add_experiment_tracking as track


class SimEnv(sim.SimEnv):
    """A simulation; results go where ours do, unless `workspace_root` is given."""

    def __init__(
        self,
        num_clients: int = 0,
        clients: Sequence[str] | None = None,
        num_threads: int | None = None,
        gpu_config: str | None = None,
        log_config: str | None = None,
        workspace_root: str | Path | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises NotSupported for `extra`, RecipeUnusable."""
        _no_extra("SimEnv", extra)
        super().__init__(
            clients,
            num_clients or None,
            num_threads=num_threads,
            gpu_config=gpu_config,
            log_config=log_config,
            workspace_root=workspace_root,
        )


class PocEnv(poc.PocEnv):
    """All services on this machine."""

    def __init__(
        self,
        num_clients: int = 2,
        clients: Sequence[str] | None = None,
        gpu_ids: Sequence[int] | None = None,
        use_he: bool = False,
        extra: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Raises NotSupported, RecipeUnusable."""
        _no_extra("PocEnv", extra)
        if use_he:
            raise NotSupported("nvflare PocEnv(use_he=True)")
        for name, value in more.items():
            if name not in {"username", "study"} and value:
                raise NotSupported(f"nvflare PocEnv({name}=...)")
        super().__init__(clients, None if clients is not None else num_clients, gpu_ids)


class ProdEnv(prod.ProdEnv):
    """The consortium's services, by a user's kit."""

    def __init__(
        self,
        startup_kit_location: str,
        login_timeout: float = 5.0,
        username: str | None = None,
        study: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises NotSupported for `extra`, KitUnusable."""
        _no_extra("ProdEnv", extra)
        super().__init__(startup_kit_location, login_timeout, username)


def add_experiment_tracking(
    recipe: Recipe,
    tracking_type: str,
    tracking_config: Mapping[str, Any] | None = None,
    client_side: bool = False,
    server_side: bool = True,
    clients: object = None,
) -> None:
    """Have the job tracked beside its result. Raises NotSupported for tracking at clients."""
    if client_side or not server_side:
        raise NotSupported("nvflare add_experiment_tracking(client_side=True)")
    track(recipe, tracking_type)


def add_cross_site_evaluation(
    recipe: Recipe,
    submit_model_timeout: float = 0,
    validation_timeout: float = 0,
    participating_clients: Sequence[str] | None = None,
) -> None:
    """Have every site evaluate every model after training. Raises NotSupported for a choice of sites."""
    if participating_clients:
        raise NotSupported("nvflare add_cross_site_evaluation(participating_clients=...)")
    evaluation.add_cross_site_evaluation(recipe)


def set_per_site_config(recipe: Recipe, config: Mapping[str, Mapping[str, Any]]) -> None:
    """What sites do otherwise than the others."""
    recipe.set_per_site_config(config)


def _no_extra(environment: str, extra: Mapping[str, Any] | None) -> None:
    if extra:
        raise NotSupported(f"nvflare {environment}(extra=...)")
