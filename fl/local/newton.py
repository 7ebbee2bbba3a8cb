"""Newton's method for logistic regression at a site: the gradient and the Hessian of its own log-likelihood.

With features X (n x d, float; a column of ones is added for the intercept, last), labels y in {0, 1} and
p = sigmoid(X w):

    g = X^T (y - p) / n          H = X^T diag(p (1 - p)) X / n

Both are means, and the update's weight is n, so that the server's weighted means are those of all records together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fl.model import WEIGHT_KEY, FLModel


def newton_update(
    model: FLModel,
    features: npt.NDArray[np.floating],
    labels: npt.NDArray[np.generic],
    metrics: Mapping[str, float] | None = None,
) -> FLModel:
    """The answer to one round's model: `gradient` (d + 1) and `hessian` (d + 1 x d + 1) at its `weights`, float64.

    Raises ValueError if shapes do not fit, a label is neither 0 nor 1, or there is no record.
    """
    weights = np.asarray(model.params["weights"], dtype=np.float64)
    rows = np.asarray(features, dtype=np.float64)
    targets = np.asarray(labels, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] + 1 != weights.size or targets.shape != rows.shape[:1] or not len(rows):
        raise ValueError(f"features {rows.shape} and labels {targets.shape} do not fit {weights.size - 1} features")
    if not np.isin(targets, (0.0, 1.0)).all():
        raise ValueError("a label is neither 0 nor 1")
    design = np.column_stack([rows, np.ones(len(rows))])
    probabilities = 0.5 * (1 + np.tanh(0.5 * (design @ weights)))  # sigmoid that never overflows
    return FLModel(
        params={
            "weights": weights,
            "gradient": design.T @ (targets - probabilities) / len(rows),
            "hessian": (design.T * (probabilities * (1 - probabilities))) @ design / len(rows),
        },
        metrics=dict(metrics or {}),
        meta={WEIGHT_KEY: len(rows)},
    )
