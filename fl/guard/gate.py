"""The check that every update passes whole before anything is done with it: at its site, and again at the server.

What comes encoded is decoded first (`fl.aggregation.deltas`). An update is admitted if its tensors are exactly those of
the model, with the model's dtypes and shapes, and every number in them is finite and small enough that a weighted sum
over any number of sites stays finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from fl.aggregation.deltas import DecodedTensors, Delta, encoded_schema
from fl.errors import MalformedTensors, UpdateRefused
from fl.tensors import FLOATS, Buffer, Schema, Source, TensorFile, layout, parse

MAX_MAGNITUDE: Final = 1e24
"""No float of an update is larger: with weights up to 2**31 and 10**4 sites a float32 sum stays below its limit."""

MAX_REASONS: Final = 20


def max_update_size(schema: Schema) -> int:
    """The most bytes that an update of `schema` may have: its tensors, and a header that another writer may pad."""
    header, _, size = layout(schema)
    return size + len(header) + 4096


def admit_update(raw: Buffer | Source, schema: Schema, *, site: str, delta: Delta | None = None) -> TensorFile:
    """Parse and check a whole update of `site`, which is a difference encoded by `delta` if that is given.

    Raises UpdateRefused with every reason (the first MAX_REASONS).
    """
    travelling = schema if delta is None else encoded_schema(schema, delta)
    try:
        update = parse(raw, max_size=max_update_size(travelling), where=site)
        if delta is not None:
            update = DecodedTensors(update, schema, delta)
    except MalformedTensors as error:
        raise UpdateRefused(site, (error.what,)) from error
    reasons = list(_reasons(update, schema))
    if reasons:
        raise UpdateRefused(site, tuple(reasons[:MAX_REASONS]))
    return update


def _reasons(update: TensorFile, schema: Schema) -> Iterator[str]:
    for name in sorted(schema.keys() - update.schema.keys()):
        yield f"tensor {name!r} is missing"
    for name in sorted(update.schema.keys() - schema.keys()):
        yield f"tensor {name!r} is not in the model"
    for name in sorted(schema.keys() & update.schema.keys()):
        wanted, got = schema[name], update.schema[name]
        if wanted != got:
            yield (
                f"tensor {name!r} is {got.dtype} {list(got.shape)}, not the model's {wanted.dtype} {list(wanted.shape)}"
            )
        elif got.dtype in FLOATS:
            largest = _largest(update, name)
            if math.isnan(largest):
                yield f"tensor {name!r} holds a NaN"
            elif math.isinf(largest):
                yield f"tensor {name!r} holds an infinity"
            elif largest > MAX_MAGNITUDE:
                yield f"tensor {name!r} holds a number of magnitude {largest:.3g}, more than {MAX_MAGNITUDE:.0e}"
        elif got.dtype == "BOOL" and any(block.view(np.uint8).max(initial=0) > 1 for _, block in update.blocks(name)):
            yield f"tensor {name!r} holds a boolean that is neither 0 nor 1"


def _largest(update: TensorFile, name: str) -> float:
    """The largest magnitude; NaN if there is any NaN, for NumPy's maximum propagates it."""
    largest = 0.0
    for _, block in update.blocks(name):
        high, low = float(block.max()), float(block.min())
        if math.isnan(high) or math.isnan(low):
            return math.nan
        largest = max(largest, high, -low)
    return largest
