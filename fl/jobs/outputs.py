"""What a job may let out of a site, as its bundle declares it, and how many bits that can carry.

The capacity is an upper bound by counting: so many different things could leave, and no script, however hostile, says
more with them than the logarithm of their number. It is what a reviewer approves and what each round is debited.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from fl.jobs.log_lines import Form, lines_bits
from fl.tensors import FLOATS

if TYPE_CHECKING:
    from fl.jobs.bundle import Bundle
    from fl.jobs.settings import JobSettings

MAX_METRICS: Final = 64
MAX_KEY: Final = 128
"""Characters of a metric's name."""
KEY_LETTER_BITS: Final = 21
"""Bits of one character that a script chooses: no more code points than 2**21."""
STEP_BITS: Final = 48
EXPONENTS: Final = range(-12, 13)
"""Decimal exponents that a number beside the tensors may have: what is smaller is 0, what is larger is refused."""
EXCEPTION_NAMES: Final = 128
"""More than Python has of its own; a failed script's is told."""
EXIT_WORDS: Final = 256 + 64 + 32
"""How a script can end: a status, a signal, or one of our sentences."""

MetricName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_KEY, pattern=r"^[ -~]+$")]


class Outputs(BaseModel):
    """What may leave a site in each round, beside tensors of the model's names, shapes and dtypes.

    - `metrics`: the names of metrics and logged values; None: whatever a script names, which carries much more.
    - `values`: how many numbers `flare.log` may let out in a round.
    - `lines` and `line_bytes`: forms of text that `flare.log_line` may let out, and how many bytes of it in a round;
      none by default (`fl.jobs.log_lines`).
    - `digits`: significant decimal digits of metrics, values and weights.
    - `clip_norm`: the L2 norm to which an update's difference from the model is scaled down; None: not.
    - `noise_multiplier`: Gaussian noise of this many times `clip_norm` on every number of the difference.
    - `bits` and `limit`: each number of the difference becomes one of 2**bits - 1 steps from -limit to limit.
    - `release_seconds`: everything of a round leaves only at a multiple of so many seconds after its task came; None:
      when it is ready.

    The last five work on floats; a model with integers or booleans cannot have them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    metrics: Annotated[tuple[MetricName, ...], Field(max_length=MAX_METRICS, strict=False)] | None = None
    values: int = Field(default=256, ge=0, le=10_000)
    lines: Annotated[tuple[Form, ...], Field(max_length=32, strict=False)] = ()
    line_bytes: int = Field(default=0, ge=0, le=1 << 16)
    digits: int = Field(default=6, ge=1, le=9)
    clip_norm: float | None = Field(default=None, gt=0, le=1e9)
    noise_multiplier: float = Field(default=0.0, ge=0, le=1e3)
    bits: int | None = Field(default=None, ge=2, le=24)
    limit: float | None = Field(default=None, gt=0, le=1e9)
    release_seconds: int | None = Field(default=None, ge=1, le=86_400)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.metrics is not None and len(set(self.metrics)) != len(self.metrics):
            raise ValueError("a metric is named twice")
        if bool(self.lines) != bool(self.line_bytes):
            raise ValueError("lines and line_bytes go together: forms of text, and a budget for it")
        if self.noise_multiplier and self.clip_norm is None:
            raise ValueError("noise_multiplier needs clip_norm, which says how much noise is enough")
        if (self.bits is None) != (self.limit is None):
            raise ValueError("bits and limit go together")
        return self

    @property
    def transforms(self) -> bool:
        """Whether an update's numbers are changed on their way out."""
        return self.clip_norm is not None or self.bits is not None


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bits that can leave one site: in each round, by what carries them, and once in a job.

    `timing` is None where nothing bounds it: what a watcher of the network can learn from when things leave.
    """

    tensors: int
    weight: int
    metrics: int
    values: int
    lines: int
    timing: int | None
    ending: int
    rounds: int

    @property
    def a_round(self) -> int:
        """In each round: what is debited for it."""
        return self.tensors + self.weight + self.metrics + self.values + self.lines + (self.timing or 0)

    @property
    def job(self) -> int:
        """In the whole job."""
        return self.a_round * self.rounds + self.ending


def capacity(bundle: Bundle, sites: int | None = None) -> Capacity:
    """What a bundle's declared outputs can carry, at a roster of so many sites (None: the least there may be).

    An evaluation across sites adds a round for each site's model, and two.
    """
    settings = bundle.settings
    across = (sites or settings.min_clients) + 2 if settings.cross_site_evaluation else 0
    outputs = settings.outputs
    number = number_bits(outputs.digits)
    names = None if outputs.metrics is None else len(outputs.metrics)
    free_name = MAX_KEY * KEY_LETTER_BITS
    metrics = MAX_METRICS * (free_name + number + 1) if names is None else names * (number + 1)
    name_bits = free_name if names is None else _bits(max(1, names))
    a_value = number + STEP_BITS + name_bits
    values = 0 if names == 0 else outputs.values * a_value + _bits(outputs.values + 1)
    lines = sum(content.count(b"\n") + 1 for content in bundle.files.values())
    return Capacity(
        tensors=tensor_bits(settings),
        weight=0 if settings.fixed_weight else number,
        metrics=metrics,
        values=values,
        lines=lines_bits(outputs.lines, outputs.line_bytes, number_choices(outputs.digits)),
        timing=_timing(settings),
        ending=_bits(EXIT_WORDS * EXCEPTION_NAMES * (lines + 1) * (settings.num_rounds + 1)),
        rounds=settings.num_rounds + across,
    )


def tensor_bits(settings: JobSettings) -> int:
    """Bits of one update's tensors, as they leave."""
    total = 0
    for spec in settings.schema_of_model.values():
        width = 1 if spec.dtype == "BOOL" else 8 * spec.size // max(1, spec.elements)
        if settings.outputs.bits is not None and spec.dtype in FLOATS:
            width = min(width, settings.outputs.bits)
        if settings.delta is not None:
            width = min(width, 16 if settings.delta == "bf16" else 8)
            total += 32 if settings.delta == "int8" else 0  # its scale
        total += spec.elements * width
    return total


def number_bits(digits: int) -> int:
    """Bits of one number beside the tensors: sign, `digits` significant digits, one of EXPONENTS; or zero."""
    return _bits(number_choices(digits))


def number_choices(digits: int) -> int:
    """So many numbers there are, rounded to so many digits."""
    found: int = 2 * 9 * 10 ** (digits - 1) * len(EXPONENTS) + 1
    return found


def _timing(settings: JobSettings) -> int | None:
    seconds = settings.outputs.release_seconds
    return None if seconds is None else _bits(-(-settings.round_seconds // seconds) + 1)


def _bits(choices: int) -> int:
    """Bits that tell `choices` things apart."""
    return math.ceil(math.log2(choices)) if choices > 1 else 0


def rounded(value: float, digits: int) -> float:
    """`value` with `digits` significant decimal digits, as it may leave.

    Raises ValueError for a magnitude beyond EXPONENTS, or what is no finite number.
    """
    if not math.isfinite(value):
        raise ValueError("it is not a finite number")
    if value == 0:
        return 0.0
    found = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{found:.{digits - 1}e}".partition("e")[2])
    if exponent < EXPONENTS.start:
        return 0.0
    if exponent >= EXPONENTS.stop:
        raise ValueError(f"it is not below 1e{EXPONENTS.stop}")
    return found
