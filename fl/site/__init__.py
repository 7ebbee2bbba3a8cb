"""A site: keeps its data, runs approved scripts in the sandbox, lets checked updates out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl.site.start import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from fl.site.start import run

        return run
    raise AttributeError(f"module 'fl.site' has no attribute {name!r}")
