"""Compiled policies, kept by their text: a query is built once."""

from __future__ import annotations

from functools import lru_cache

from attestation.broker.release import KBS_MODULE
from policies.decisions import Rules


@lru_cache(maxsize=8)
def floor_rules(text: str) -> Rules:
    """The charter's floor, compiled once."""
    return Rules({"floor.rego": text})


@lru_cache(maxsize=256)
def owner_rules(text: str) -> Rules:
    """An owner's release policy, compiled once, with the rule that opens it to KBS guests."""
    return Rules({"release.rego": text, "kbs.rego": KBS_MODULE})
