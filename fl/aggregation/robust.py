"""Aggregation that some bad updates cannot move far: norm clipping, trimmed mean, Krum.

All look at single updates, so that they need an enclave and exclude secure aggregation; all of a round's updates are in
memory at once. Weights are not used: who poisons chooses its weight, too.

- *Norm clipping* (Sun et al. 2019, "Can You Really Backdoor Federated Learning?"): every difference from the model is
  scaled down to one norm, by default the median of all; then the mean.
- *Trimmed mean* (Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 2): for each number by itself the
  mean without the `trim` largest and smallest part of the updates.
- *Krum* (Blanchard et al. 2017, "Machine Learning with Adversaries"): of n updates, of which `byzantine` (f) are bad,
  the `keep` ones with the least sum of squared distances to their n - f - 2 nearest; their mean. It needs n >= 2f + 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fl.errors import AggregationFailed
from fl.jobs.settings import JobSettings, Krum, NormClipping, Robust, TrimmedMean
from fl.model import ParamsType
from fl.tensors import NUMPY_DTYPE, Schema, TensorFile, layout, narrow_bf16
from fl.transport.memory import DraftMemory, SealedMemory
from fl.transport.stored import Stored

Table = npt.NDArray[Any]
"""Differences from the model, float32 or, if the model has float64, float64: [updates, numbers]."""
BLOCK = 1 << 16


def norm_clipped(table: Table, norm: float | None) -> Table:
    """The mean of the rows, each scaled to an L2 norm of at most `norm` (None: the median of their norms)."""
    norms = np.sqrt(np.einsum("ij,ij->i", table, table, dtype=np.float64))
    bound = float(np.median(norms)) if norm is None else norm
    factors = np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound)
    found: Table = (factors.astype(table.dtype) @ table) / table.dtype.type(len(table))
    return found


def trimmed_mean(table: Table, trim: float) -> Table:
    """The mean of each column without its `trim` part of smallest and of largest numbers, rounded up."""
    count = len(table)
    cut = int(np.ceil(trim * count))
    if 2 * cut >= count:
        raise AggregationFailed(f"of {count} updates nothing is left without {cut} at each end")
    found = np.empty(table.shape[1], dtype=table.dtype)
    for start in range(0, table.shape[1], BLOCK):
        part = np.sort(table[:, start : start + BLOCK], axis=0)
        found[start : start + BLOCK] = part[cut : count - cut].mean(axis=0)
    return found


def krum(table: Table, byzantine: int, keep: int) -> Table:
    """The mean of the `keep` rows that are nearest to the most others."""
    count = len(table)
    if count < 2 * byzantine + 3 or keep > count - byzantine:
        raise AggregationFailed(
            f"Krum against {byzantine} of {count} updates: it needs {2 * byzantine + 3}, and keeps at most "
            f"{count - byzantine}"
        )
    distances = np.zeros((count, count))
    for row in range(count):
        for other in range(row + 1, count):
            apart = (table[row] - table[other]).astype(np.float64)
            distances[row, other] = distances[other, row] = float(apart @ apart)
    nearest = np.sort(distances + np.diag(np.full(count, np.inf)), axis=1)[:, : count - byzantine - 2]
    chosen = np.argsort(nearest.sum(axis=1), kind="stable")[:keep]
    found: Table = table[np.sort(chosen)].mean(axis=0)
    return found


class RobustAggregation:
    """Keeps a round's updates and makes the next model of them by one rule."""

    def __init__(self, schema: Schema, params_type: ParamsType, rule: Robust) -> None:
        self._schema = schema
        self._params_type = params_type
        self._rule = rule
        wide = any(spec.dtype == "F64" for spec in schema.values())
        self._dtype = np.dtype(np.float64 if wide else np.float32)
        self._updates: list[Table] = []

    def fold(self, update: TensorFile, weight: float, site: str = "", memory: Stored | None = None) -> None:
        """Keep an admitted update."""
        self._updates.append(_numbers(update, self._schema, self._dtype))

    def result(self, model: TensorFile) -> SealedMemory:
        """The next global model. Raises AggregationFailed if there are too few updates for the rule."""
        if not self._updates:
            raise ValueError("no update was folded")
        current = _numbers(model, self._schema, self._dtype)
        table = np.stack(self._updates)
        self._updates.clear()
        if self._params_type is ParamsType.FULL:
            table -= current
        following = current + self._aggregated(table)
        header, offsets, size = layout(self._schema)
        at = 0
        with DraftMemory(size) as draft:
            draft.view[: len(header)] = header
            for name, spec in self._schema.items():
                part = following[at : at + spec.elements]
                at += spec.elements
                target = np.frombuffer(draft.view, NUMPY_DTYPE[spec.dtype], spec.elements, offsets[name])
                target[:] = narrow_bf16(part) if spec.dtype == "BF16" else part
                del target
            return SealedMemory(*draft.seal())

    def close(self) -> None:
        """Forget the updates."""
        self._updates.clear()

    def _aggregated(self, table: Table) -> Table:
        match self._rule:
            case NormClipping(norm=norm):
                return norm_clipped(table, norm)
            case TrimmedMean(trim=trim):
                return trimmed_mean(table, trim)
            case Krum(byzantine=byzantine, keep=keep):
                return krum(table, byzantine, keep)


def robust_aggregation(settings: JobSettings) -> Callable[[], RobustAggregation] | None:
    """What makes the job's aggregation, if it is a robust one."""
    rule = settings.robust
    if rule is None:
        return None
    return lambda: RobustAggregation(settings.schema_of_model, ParamsType(settings.params_type), rule)


def _numbers(file: TensorFile, schema: Schema, dtype: np.dtype[Any]) -> Table:
    """All of a file's numbers, one after the other in the schema's order."""
    found = np.empty(sum(spec.elements for spec in schema.values()), dtype=dtype)
    at = 0
    for name, spec in schema.items():
        for start, block in file.blocks(name):
            found[at + start : at + start + block.size] = block
        at += spec.elements
    return found
