"""Federated statistics at a site: counts, sums, squared deviations and histograms of its records, with a floor.

Nothing about fewer than `min_count` records leaves a site. A feature with fewer values is left out whole. Bins with
fewer are sent as empty, and so are further bins, the smallest first, until all the records that the histogram does not
show (those outside its range among them) are at least `min_count` or none, so that no difference tells of a few.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fl.model import FLModel
from fl.tensors import TensorFile


def statistics_update(model: FLModel, values: npt.NDArray[np.floating]) -> FLModel:
    """The answer to one round's model. `values` is [records, features], in the recipe's order of features.

    NaN and infinities are missing values. Raises ValueError if the shape does not fit.
    """
    table = np.asarray(values, dtype=np.float64)
    edges = model.params["edges"]
    if table.ndim != 2 or table.shape[1] != len(edges):
        raise ValueError(f"the values have shape {table.shape}, not [records, {len(edges)}]")
    floor = int(model.meta["fedstats_min_count"])
    sent: dict[str, Any] = {name: np.zeros_like(value) for name, value in model.params.items()}
    for feature, column in enumerate(table.T):
        known = column[np.isfinite(column)]
        if known.size < floor:
            continue
        sent["count"][feature] = known.size
        sent["sum"][feature] = known.sum()
        sent["squares"][feature] = np.square(known - model.params["mean"][feature]).sum()
        counts, _ = np.histogram(known, bins=edges[feature])
        sent["histogram"][feature] = with_floor(counts, known.size, floor)
    return FLModel(params=sent)


def with_floor(counts: npt.NDArray[np.integer], total: int, floor: int) -> npt.NDArray[np.float64]:
    """The histogram's `counts` of `total` records with every bin emptied that would tell of fewer than `floor`."""
    shown = np.where(counts < floor, 0, counts).astype(np.float64)
    for smallest in np.argsort(counts, kind="stable"):
        if not 0 < total - shown.sum() < floor:
            break
        shown[smallest] = 0
    return shown


def below_floor(update: TensorFile, floor: int) -> str | None:
    """Why an update's tensors `count` and `histogram` tell of fewer than `floor` records, or of none; None if not.

    What a histogram leaves out of a feature's count is a number of records too.
    """
    for name in ("count", "histogram"):
        counts = update.array(name)
        if (counts < 0).any() or (counts != np.rint(counts)).any():
            return f"its {name} holds what is no count"
        if ((counts > 0) & (counts < floor)).any():
            return f"its {name} tells of fewer than {floor} records"
    hidden = update.array("count") - update.array("histogram").sum(axis=1)
    if (hidden < 0).any():
        return "its histogram has more records than its count"
    if ((hidden > 0) & (hidden < floor)).any():
        return f"its histogram leaves out fewer than {floor} records"
    if any(np.any(update.array(name)) for name in ("mean", "edges")):
        return "it fills in what only the server tells"
    silent = update.array("count") == 0
    if any(np.any(update.array(name)[silent]) for name in ("sum", "squares")):
        return "it sums up a feature of which it counts nothing"
    return None
