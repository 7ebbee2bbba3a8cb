"""Numbers as whole steps of a ring, so that masks and sums of them are exact (`fl.aggregation.masking`).

A site's number times its weight becomes a whole number y = round(x * w * steps); sums are modulo 2**32 or 2**64. Steps
are as fine as the ring allows: the sites' sum of numbers at their limit still fits, so nothing ever wraps around.

Rings of 32 bits need to know how large weights are. `unit` says so: a weight of it may have numbers up to `limit`, a
larger weight smaller ones. With n sites, whose weights sum up to W, a mean is off by no more than
n**2 * limit * unit / (2**32 * W); with equal weights of unit / 16 that is n * limit / 2**28.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fl.errors import MaskingRefused

MAX_WEIGHT: Final = 1 << 16
WEIGHT_STEPS: Final = 1 << 20
"""Steps of a weight to one, and of a metric times its weight."""
MAX_METRIC: Final = float(1 << 15)
HEADROOM: Final = 16
"""How much larger than the mean of a round's weights one of the next round may be, at the numbers' limit."""
PIECE: Final = 1 << 16
"""Numbers that are worked on at a time, so that they stay in a processor's cache."""

Vector: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
Numbers: TypeAlias = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How the numbers of one round are written. `sites`: so many are summed at most."""

    limit: float
    sites: int
    unit: float | None
    """None: the ring has 64 bits, and numbers may have the limit whatever their weight."""

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The ring's."""
        return np.uint64 if self.unit is None else np.uint32

    @property
    def largest(self) -> int:
        """The most steps of one site: so many sites' sum stays in the ring, roundings included."""
        return 1 << 52 if self.unit is None else ((1 << 31) - (1 << 9)) // self.sites

    @property
    def steps(self) -> float:
        """Steps of a number times its weight to one."""
        return self.largest / (self.limit * (MAX_WEIGHT if self.unit is None else self.unit))

    def steps_of(self, values: Numbers, weight: float, into: Vector | None = None) -> Vector:
        """Finite numbers times `weight`, as they are written (`into` an array, if it is given); `values` are used up.

        Raises MaskingRefused for a number beyond its limit: cut off, it would make the sum another one.
        """
        factor = weight * self.steps
        np.multiply(values, values.dtype.type(factor), out=values)
        np.rint(values, out=values)
        kind = np.int32 if self.unit is not None else np.int64
        whole = np.empty(values.size, dtype=kind) if into is None else into.view(kind)
        with np.errstate(invalid="ignore"):  # what does not fit becomes the least or the largest whole number
            np.copyto(whole, values, casting="unsafe")
        most = min(self.largest, round(self.limit * factor))
        if whole.size and not -most <= int(whole.min()) <= int(whole.max()) <= most:
            raise MaskingRefused(
                f"a number is beyond {most / factor:.6g}, which is what one may be at a weight of {weight:g}"
            )
        return whole.view(self.dtype)

    def read(self, total: Vector, weight: float, dtype: type[np.floating[Any]] = np.float64) -> Numbers:
        """A sum as numbers: divided by the sum of weights."""
        whole = total.view(np.int32 if self.unit is not None else np.int64)
        found: Numbers = whole.astype(dtype)
        found *= dtype(1 / (self.steps * weight))
        return found


def next_unit(weights: float, sites: int) -> float:
    """The unit after a round of so many sites, whose weights sum up to `weights`: a power of two."""
    mantissa, exponent = np.frexp(HEADROOM * weights / sites)
    return float(2.0 ** (int(exponent) - (1 if mantissa == 0.5 else 0)))


def check_unit(unit: float | None) -> None:
    """Raises MaskingRefused for what `next_unit` gives for no weights."""
    if unit is not None and not (1 / WEIGHT_STEPS <= unit <= HEADROOM * MAX_WEIGHT and np.frexp(unit)[0] == 0.5):
        raise MaskingRefused(f"{unit} is no unit of weights")


def tail_of(metrics: Sequence[float], weight: float) -> tuple[Vector, float]:
    """Metrics times the weight, then the weight; and the weight as it was written. Raises MaskingRefused."""
    steps = round(weight * WEIGHT_STEPS)
    if not 1 <= steps <= MAX_WEIGHT * WEIGHT_STEPS:
        raise MaskingRefused(f"its weight is not between 1/{WEIGHT_STEPS} and {MAX_WEIGHT}")
    if not all(abs(metric) <= MAX_METRIC for metric in metrics):
        raise MaskingRefused(f"a metric is beyond {MAX_METRIC:g}")
    whole = np.array([*(round(metric * steps) for metric in metrics), steps], dtype=np.int64)
    return whole.view(np.uint64), steps / WEIGHT_STEPS


def read_tail(total: Vector, sites: int) -> tuple[list[float], float]:
    """The mean metrics, and the sum of weights. Raises MaskingRefused for a sum that cannot be one."""
    *metrics, weight = (int(number) for number in total.view(np.int64))
    if not 0 < weight <= MAX_WEIGHT * WEIGHT_STEPS * sites:
        raise MaskingRefused("the sum of weights is none: a site has sent what is no masked vector")
    return [metric / weight for metric in metrics], weight / WEIGHT_STEPS
