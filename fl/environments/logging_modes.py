"""What a simulation says while it runs: `log_config` of SimEnv."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fl.errors import RecipeUnusable

MAX_CONFIG: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class LogMode:
    """`lines`: a line for each event instead of the live display; `output`: what clients printed, at the end;
    `clients`: what `logging.config.dictConfig` gets in each client."""

    lines: bool = False
    output: bool = False
    clients: dict[str, Any] | None = None


MODES: Final = {
    "concise": LogMode(),
    "full": LogMode(lines=True),
    "verbose": LogMode(
        lines=True,
        output=True,
        clients={
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"output": {"class": "logging.StreamHandler"}},
            "root": {"level": "DEBUG", "handlers": ["output"]},
        },
    ),
}


def read_log_config(log_config: str | Path | None) -> LogMode:
    """The mode of this name, or the one of a JSON file. Raises RecipeUnusable."""
    if log_config is None:
        return MODES["concise"]
    if str(log_config) in MODES:
        return MODES[str(log_config)]
    where = "log_config"
    try:
        with Path(log_config).open("rb") as file:
            raw = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise RecipeUnusable(
            f"{str(log_config)!r} is no mode and no file", where=where, do=f"Use {', '.join(MODES)}, or a JSON file."
        ) from error
    try:
        found = json.loads(raw) if len(raw) <= MAX_CONFIG else None
    except (ValueError, RecursionError) as error:
        raise RecipeUnusable(f"{log_config} is not JSON", where=where) from error
    if not isinstance(found, dict) or found.get("version") != 1:
        raise RecipeUnusable(f"{log_config} is no configuration of logging (version 1)", where=where)
    return LogMode(clients=found)
