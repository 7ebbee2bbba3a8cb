"""Helpers of recipes."""

from __future__ import annotations

from fl.compat import missing
from fl.compat.nvflare.environments import add_cross_site_evaluation, add_experiment_tracking, set_per_site_config

__all__ = ["add_cross_site_evaluation", "add_experiment_tracking", "set_per_site_config"]


def __getattr__(name: str) -> object:
    missing(__name__, name)
