"""Stand-ins."""

from __future__ import annotations

from fl.compat import missing


def __getattr__(name: str) -> object:
    missing(__name__, name)
