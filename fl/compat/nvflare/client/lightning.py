"""The client API with `patch` for a trainer: `import nvflare.client.lightning as flare`."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.client import (
    FLModel,
    ParamsType,
    clear,
    get_job_id,
    get_site_name,
    get_task_name,
    init,
    is_evaluate,
    is_running,
    is_submit_model,
    is_train,
    log,
    receive,
    send,
    shutdown,
    system_info,
)
from fl.local.lightning import patch

__all__ = [
    "FLModel", "ParamsType", "clear", "get_job_id", "get_site_name", "get_task_name", "init", "is_evaluate",
    "is_running", "is_submit_model", "is_train", "log", "patch", "receive", "send", "shutdown", "system_info",
]  # fmt: skip


def __getattr__(name: str) -> object:
    missing(__name__, name)
