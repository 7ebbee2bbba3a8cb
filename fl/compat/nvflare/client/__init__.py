"""The client API by FLARE's names and signatures: `import nvflare.client as flare`."""

from __future__ import annotations

from typing import Any

from fl import client
from fl.client import get_job_id, get_site_name, is_evaluate, is_running, is_submit_model, is_train
from fl.compat import missing
from fl.compat.nvflare import newton_scripts
from fl.compat.nvflare.names import NUMPY_KEY
from fl.model import FLModel, ParamsType, Scalar

__all__ = [
    "FLModel", "ParamsType", "clear", "get_job_id", "get_site_name", "get_task_name", "init", "is_evaluate",
    "is_running", "is_submit_model", "is_train", "log", "receive", "send", "shutdown", "system_info",
]  # fmt: skip


def init(rank: object = None, config_file: object = None) -> None:
    """Join the job; a script that runs as several ranks has one that does."""
    client.init()


_weights: Any = None
"""What a script of Newton's method received."""


def receive(timeout: float | None = None, ctx: object = None) -> FLModel | None:
    """The task's model; the job's own bounds end the wait."""
    global _weights
    model = client.receive()
    if model is None:
        return None
    shown = newton_scripts.received(model)
    _weights = None if shown is model else shown.params[NUMPY_KEY]
    return shown


def send(model: FLModel, clear_cache: bool = True, ctx: object = None) -> None:
    """Hand over the answer."""
    client.send(newton_scripts.answered(model, _weights))


def system_info(ctx: object = None) -> dict[str, Scalar]:
    """Where the script runs."""
    return client.system_info()


def get_task_name(ctx: object = None) -> str:
    """`train`, `validate` or `submit_model`."""
    return "validate" if is_evaluate() else "submit_model" if is_submit_model() else "train"


def log(key: str, value: Any, data_type: object = None, ctx: object = None, **more: Any) -> None:
    """Log one number; `global_step` among `more` is its step."""
    client.log(key, value, int(more.get("global_step") or more.get("step") or 0))


def clear(ctx: object = None) -> None:
    """There is no cache."""


def shutdown(ctx: object = None) -> None:
    """The script ends by itself."""


def __getattr__(name: str) -> object:
    missing(__name__, name)
