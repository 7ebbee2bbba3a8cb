"""What of a script's answer may leave its site: the pure part of the export gate.

The answer was received whole, in memory that its script cannot change any more. Then, in this order: it is parsed and
checked against the declared outputs; dequantised (half-precision floats widened); its difference from the round's model
is clipped; noised; quantised; what leaves is written anew, in one layout, and encoded if the job's differences travel
in fewer bytes. Nothing of the script's own bytes leaves:
not the header, its order, padding or metadata
(a file that is that layout already is sent as it is); NaNs and booleans other than 0 and 1 are refused with the rest
(`fl.guard.gate`). What leaves has one size, whatever it says.

Whatever is refused is told in one sentence that the script has no part in: its reasons, which may repeat the script's
words, are for its author's simulation alone (`OutputRefused.reasons`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fl.aggregation.deltas import ErrorFeedback
from fl.errors import MalformedTensors, OutputRefused, UpdateRefused
from fl.guard.gate import admit_update
from fl.guard.keystream import KEY_SIZE, Keystream
from fl.jobs.log_lines import rewritten
from fl.jobs.outputs import Outputs, rounded
from fl.jobs.settings import FedStatsOptions, JobSettings, TaskKind
from fl.local.statistics import below_floor
from fl.model import ParamsType, check_metrics
from fl.tensors import BLOCK, FLOATS, NUMPY_DTYPE, TensorFile, encode, layout, narrow_bf16, parse, widen_bf16
from fl.transport.memory import DraftMemory, SealedMemory
from fl.transport.stored import Stored

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Masked: TypeAlias = Callable[[Iterable[Array], Mapping[str, float], float], Stored]
"""Makes what leaves under masks of an update's differences, its metrics and its weight."""


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What leaves: `memory` is its holder's to close."""

    memory: Stored
    weight: float
    metrics: Mapping[str, float]


def disclose(
    raw: SealedMemory,
    *,
    params_type: str,
    weight: float,
    metrics: Mapping[str, Any],
    model: SealedMemory,
    settings: JobSettings,
    site: str,
    task: TaskKind = "train",
    masked: Masked | None = None,
    feedback: ErrorFeedback | None = None,
    random: Callable[[int], bytes] = os.urandom,
) -> Disclosure:
    """What may leave of an answer to `model`, under masks if there are any. Raises OutputRefused, MaskingRefused.

    `feedback` encodes what leaves of a training, where the job's differences travel in fewer bytes.

    Of an evaluation metrics leave and no tensor; a site's own model leaves as an update does, whole.
    """
    if task == "evaluate":
        return _evaluation(raw, weight, metrics, settings, site)
    if task == "submit_model":
        settings = settings.model_copy(update={"params_type": "FULL"})
    if params_type != settings.params_type:
        raise OutputRefused(site, "its parameters are not of the job's kind", (f"they are {params_type}",))
    numbers = disclosed_metrics(metrics, settings.outputs, site)
    shown = disclosed_weight(weight, settings, site)
    try:
        update = admit_update(raw.view, settings.schema_of_model, site=site)
    except UpdateRefused as error:
        raise OutputRefused(site, "its tensors are not what the job declares", error.reasons) from error
    try:
        reasons = tuple(_below_floor(update, settings))
        if reasons:
            raise OutputRefused(site, "its statistics tell of too few records", reasons)
        current = parse(model.view, max_size=model.size)
        try:
            if masked is not None:
                blocks = (block for _, _, block, _ in _shown(update, current, settings, random))
                return Disclosure(masked(blocks, numbers, shown), 1.0, {})
            memory = raw.share() if _is_written(update, settings) else _written(update, current, settings, random)
        finally:
            current.raw.release()
    finally:
        update.raw.release()
    if feedback is not None and task == "train":
        with memory as difference:
            memory = feedback.encoded(difference)
    return Disclosure(memory, shown, numbers)


def error_feedback(settings: JobSettings) -> ErrorFeedback | None:
    """What encodes a site's differences in one job, where they travel in fewer bytes."""
    return None if settings.delta is None else ErrorFeedback(settings.schema_of_model, settings.delta)


def _evaluation(
    raw: SealedMemory, weight: float, metrics: Mapping[str, Any], settings: JobSettings, site: str
) -> Disclosure:
    numbers = disclosed_metrics(metrics, settings.outputs, site)
    shown = disclosed_weight(weight, settings, site)
    try:
        admit_update(raw.view, {}, site=site).raw.release()
    except UpdateRefused as error:
        raise OutputRefused(site, "an evaluation has no tensors", error.reasons) from error
    return Disclosure(SealedMemory.of(encode({})), shown, numbers)


class LoggedNumbers:
    """The numbers that a script logs in one round, as they may leave. For one thread."""

    def __init__(self, outputs: Outputs, site: str) -> None:
        self._outputs = outputs
        self._site = site
        self._count = 0

    def begin_round(self) -> None:
        """Count anew."""
        self._count = 0

    def disclosed(self, key: str, value: float) -> float:
        """The number as it may leave. Raises OutputRefused, also when there are more than are declared."""
        self._count += 1
        if self._count > self._outputs.values:
            raise OutputRefused(self._site, "it logs more numbers in a round than the job declares", (key,))
        return disclosed_number(key, value, self._outputs, self._site)


class LoggedLines:
    """The lines of text that a script logs in one round, as they may leave. For one thread."""

    def __init__(self, outputs: Outputs, site: str) -> None:
        self._outputs = outputs
        self._site = site
        self._bytes = 0

    def begin_round(self) -> None:
        """Count anew."""
        self._bytes = 0

    def disclosed(self, line: str) -> str:
        """The line as it may leave. Raises OutputRefused, also when there are more than are declared."""
        try:
            shown = rewritten(line, self._outputs.lines, self._outputs.digits)
        except ValueError as error:
            raise OutputRefused(self._site, "it logs text that the job does not declare", (str(error),)) from error
        self._bytes += len(shown) + 1
        if self._bytes > self._outputs.line_bytes:
            what = "it logs more text in a round than the job declares"
            raise OutputRefused(self._site, what, (f"more than {self._outputs.line_bytes} bytes",))
        return shown


def disclosed_metrics(metrics: Mapping[str, Any], outputs: Outputs, site: str) -> dict[str, float]:
    """Metrics as they may leave: declared names, rounded, in the order of their names. Raises OutputRefused."""
    try:
        checked = check_metrics(metrics)
    except MalformedTensors as error:
        raise OutputRefused(site, "its metrics are not what the job declares", (error.what,)) from error
    return {name: disclosed_number(name, checked[name], outputs, site) for name in sorted(checked)}


def disclosed_number(name: str, value: float, outputs: Outputs, site: str) -> float:
    """A named number as it may leave. Raises OutputRefused."""
    if outputs.metrics is not None and name not in outputs.metrics:
        raise OutputRefused(site, "it names a metric that the job does not declare", (f"metric {name!r}",))
    try:
        return rounded(value, outputs.digits)
    except ValueError as error:
        raise OutputRefused(site, "a metric is out of bounds", (f"metric {name!r}: {error}",)) from error


def disclosed_weight(weight: float, settings: JobSettings, site: str) -> float:
    """An update's weight as it may leave. Raises OutputRefused."""
    if settings.fixed_weight:
        if weight != 1:
            raise OutputRefused(site, "its weight is not 1, as this job's is", (f"weight {weight}",))
        return 1.0
    try:
        found = rounded(weight, settings.outputs.digits)
    except ValueError as error:
        raise OutputRefused(site, "its weight is out of bounds", (f"weight: {error}",)) from error
    if found <= 0:
        raise OutputRefused(site, "its weight is out of bounds", (f"weight {weight}",))
    return found


def _below_floor(update: TensorFile, settings: JobSettings) -> Iterator[str]:
    options = settings.options
    if isinstance(options, FedStatsOptions):
        reason = below_floor(update, options.min_count)
        if reason is not None:
            yield reason


def _is_written(update: TensorFile, settings: JobSettings) -> bool:
    """Whether the script's file is byte for byte what would be written anew, so that no copy has to be made."""
    header, _, size = layout(settings.schema_of_model)
    own = update.raw[: len(header)]
    return not settings.outputs.transforms and len(update.raw) == size and own == header


def _written(
    update: TensorFile, model: TensorFile, settings: JobSettings, random: Callable[[int], bytes]
) -> SealedMemory:
    """The update in the one layout, its floats clipped, noised and quantised as declared."""
    schema = settings.schema_of_model
    header, offsets, size = layout(schema)
    with DraftMemory(size) as draft:
        draft.view[: len(header)] = header
        if not settings.outputs.transforms:
            for name, spec in schema.items():
                draft.view[offsets[name] : offsets[name] + spec.size] = update.bytes_of(name)
            return SealedMemory(*draft.seal())
        for name, start, shown, current in _shown(update, model, settings, random):
            spec = schema[name]
            if current is not None:
                shown += current
            target = np.frombuffer(draft.view, NUMPY_DTYPE[spec.dtype], spec.elements, offsets[name])
            target[start : start + shown.size] = (
                narrow_bf16(shown.astype(np.float32)) if spec.dtype == "BF16" else shown
            )
            del target
        return SealedMemory(*draft.seal())


def _shown(
    update: TensorFile, model: TensorFile, settings: JobSettings, random: Callable[[int], bytes]
) -> Iterator[tuple[str, int, Array, Array | None]]:
    """The differences as they may leave, tensor by tensor in flat blocks: name, first index, numbers, and the model's
    if the update is full."""
    outputs = settings.outputs
    full = settings.params_type == ParamsType.FULL
    scale = _scale(update, model, outputs, full)
    noise = Keystream(random(KEY_SIZE)) if outputs.noise_multiplier else None
    for name, spec in settings.schema_of_model.items():
        wide = outputs.transforms or spec.dtype == "F64"
        for start, difference, current in _differences(update, model, name, full, np.float64 if wide else np.float32):
            shown = _transformed(difference, scale, outputs, noise) if outputs.transforms else difference
            yield name, start, shown, current


def _scale(update: TensorFile, model: TensorFile, outputs: Outputs, full: bool) -> float:
    """By what the difference is multiplied so that its L2 norm, over all tensors, is at most `clip_norm`."""
    if outputs.clip_norm is None:
        return 1.0
    squares = 0.0
    for name, spec in update.schema.items():
        if spec.dtype in FLOATS:
            for _, difference, _ in _differences(update, model, name, full, np.float64):
                squares += float(np.dot(difference, difference))
    norm = float(np.sqrt(squares))
    return min(1.0, outputs.clip_norm / norm) if norm > 0 else 1.0


def _differences(
    update: TensorFile, model: TensorFile, name: str, full: bool, dtype: type[np.floating[Any]]
) -> Iterator[tuple[int, Array, Array | None]]:
    """A tensor's difference from the model in flat blocks of `dtype`, each with its first index and, if the update is
    `full`, the model's block, to be added again."""
    flat = model.array(name).reshape(-1)
    for start, block in update.blocks(name):
        if not full:
            yield start, block.astype(dtype), None
            continue
        part = flat[start : start + min(BLOCK, block.size)]
        current = (widen_bf16(part) if update.schema[name].dtype == "BF16" else part).astype(dtype, copy=False)
        yield start, np.subtract(block, current, dtype=dtype), current


def _transformed(difference: Array, scale: float, outputs: Outputs, noise: Keystream | None) -> Array:
    shown = difference * scale
    if noise is not None and outputs.clip_norm is not None:
        shown += noise.normal(shown.size) * (outputs.noise_multiplier * outputs.clip_norm)
    if outputs.bits is not None and outputs.limit is not None:
        steps = (1 << (outputs.bits - 1)) - 1
        np.clip(shown, -outputs.limit, outputs.limit, out=shown)
        shown = np.rint(shown * (steps / outputs.limit)) * (outputs.limit / steps)
    return shown
