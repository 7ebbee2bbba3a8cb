"""The FL server: coordinates jobs over attested sites, aggregates in its enclave, seals the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl.server.start import serve

__all__ = ["serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":
        from fl.server.start import serve

        return serve
    raise AttributeError(f"module 'fl.server' has no attribute {name!r}")
