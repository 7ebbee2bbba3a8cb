"""Stand-ins for NVIDIA FLARE's recipes and client API, written anew from its public documentation."""

from __future__ import annotations

from fl.compat import missing


def __getattr__(name: str) -> object:
    missing(__name__, name)
