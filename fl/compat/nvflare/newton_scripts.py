"""Logistic regression by Newton's method, between FLARE's scripts and the wire.

Theirs: one array NUMPY_KEY, a column (d + 1 x 1) with the intercept first; an answer of `gradient` (d + 1 x 1) and
`hessian` (d + 1 x d + 1), sums over the site's records, whose number is `NUM_STEPS_CURRENT_ROUND`. Ours
(`fl.local.newton`): `weights` (d + 1) with the intercept last, and means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl.compat.nvflare.names import NUMPY_KEY
from fl.model import WEIGHT_KEY, FLModel

OURS = frozenset({"weights", "gradient", "hessian"})
THEIRS = frozenset({"gradient", "hessian"})


def received(model: FLModel) -> FLModel:
    """A received model as FLARE's scripts know it."""
    if model.params.keys() != OURS:
        return model
    weights = np.asarray(model.params["weights"])
    return FLModel(
        params={NUMPY_KEY: np.roll(weights, 1)[:, None]},
        meta=dict(model.meta),
        current_round=model.current_round,
        total_rounds=model.total_rounds,
    )


def answered(model: FLModel, weights: npt.NDArray[Any] | None) -> FLModel:
    """A script's answer as it goes out; `weights` are those that came, or None if they were no such model."""
    if weights is None or model.params.keys() != THEIRS:
        return model
    records = float(model.meta.get(WEIGHT_KEY, 1))
    gradient = np.asarray(model.params["gradient"], dtype=np.float64).reshape(-1) / records
    hessian = np.asarray(model.params["hessian"], dtype=np.float64) / records
    params = {
        "weights": np.roll(np.asarray(weights, dtype=np.float64).reshape(-1), -1),
        "gradient": np.roll(gradient, -1),
        "hessian": np.roll(hessian, (-1, -1), axis=(0, 1)),
    }
    return FLModel(params=params, metrics=model.metrics, meta=model.meta)
