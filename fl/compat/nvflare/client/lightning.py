"""The client API with `patch` for Lightning's trainer: `import nvflare.client.lightning as flare`."""

from __future__ import annotations

from typing import Any

from fl.compat import NotSupported
from fl.compat.nvflare import client
from fl.local.lightning import patch as _patch


def patch(trainer: Any, **more: Any) -> None:
    """Have `trainer` take its models from the job and give its updates to it. Raises NotSupported, RecipeUnusable."""
    for name, value in more.items():
        if value is not None:
            raise NotSupported(f"nvflare.client.lightning.patch({name}=...)")
    _patch(trainer)


def __getattr__(name: str) -> Any:
    return getattr(client, name)
