"""Reading what an operator writes for a service: one bounded TOML file, checked by its model."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from policies.errors import Unusable

SETTINGS_LIMIT: Final = 64 * 1024
"""Bytes of a settings file."""
M = TypeVar("M", bound=BaseModel)


def read_settings(kind: type[M], path: Path, *, do: str) -> M:
    """The settings in the file at `path`. Raises Unusable, naming what is wrong; `do` says where they are explained."""
    try:
        with path.open("rb") as file:
            raw = file.read(SETTINGS_LIMIT + 1)
        if len(raw) > SETTINGS_LIMIT:
            raise Unusable("this is too large for a service's settings", where=str(path), do=do)
        return kind.model_validate(tomllib.loads(raw.decode("utf-8")))
    except OSError as error:
        raise Unusable(f"the settings cannot be read: {error.strerror}", where=str(path), do=do) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unusable(f"the settings are no TOML: {error}", where=str(path), do=do) from error
    except ValidationError as error:
        words = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:10])
        raise Unusable(f"the settings are not valid: {words}", where=str(path), do=do) from error
