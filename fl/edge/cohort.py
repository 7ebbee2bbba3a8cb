"""A gateway's half of masked sums: cohorts of devices, step by step, each with a time to be over. Pure.

A cohort goes on from a step when every device that is expected has taken it, or when its time is over and enough have;
else it has failed, and tells nothing of anyone. A device that comes too late, or says two things, is out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fl.aggregation.fixed_point import read_tail
from fl.aggregation.masking import MaskedSum, Round
from fl.edge.mask_steps import STEPS, Step
from fl.edge.masks import (
    COUNTED,
    TAIL,
    VALUES,
    DeviceMasking,
    Introduction,
    confirmation,
    is_signed,
    read_introduction,
    read_shares,
    round_of,
    write_shares,
    write_texts,
)
from fl.errors import MalformedTensors, MaskingRefused
from fl.tensors import Buffer, Schema, TensorSpec, layout, parse

MAX_OPEN: Final = 256 << 20
"""Bytes of all sums that are open."""
_SLACK: Final = 4096


@dataclass(frozen=True, slots=True)
class Said:
    """What a device is told: to go on to `step`, with `body`; to `wait`; or, without either, that it is over: `why`."""

    step: Step | None = None
    body: str = ""
    wait: bool = False
    why: str = ""
    counted: bool = False


@dataclass(frozen=True, slots=True)
class CohortSum:
    """The sum of the survivors' weighted differences, laid flat in the order of their sorted names, and of weights."""

    devices: tuple[str, ...]
    values: npt.NDArray[np.float64] = field(repr=False)
    weight: float


def masked_schema(numbers: int) -> Schema:
    """What a masked difference of so many numbers looks like."""
    return {VALUES: TensorSpec("U64", (numbers,)), TAIL: TensorSpec("U64", (1,))}


def masked_most(numbers: int) -> int:
    """The most bytes of one."""
    return layout(masked_schema(numbers))[2] + _SLACK


class Cohort:
    """One cohort. Times are its gateway's running clock's."""

    def __init__(self, masking: DeviceMasking, context: bytes, numbers: int, now: float) -> None:
        """`numbers`: of a difference."""
        self._masking = masking
        self._context = context
        self._numbers = numbers
        self._until = now + masking.seconds
        self._at = 0  # the step that is taken now
        self._heard: list[dict[str, bytes]] = [{} for _ in STEPS]  # what each device said in each step, by its digest
        self._expected: set[str] = set()
        self._bodies: dict[str, str] = {}  # of the step that is taken now
        self._keys: dict[str, Introduction] = {}
        self._public: dict[str, EllipticCurvePublicKey] = {}
        self._outcomes: list[Mapping[str, str]] = []
        self._round: Round | None = None
        self._sum: MaskedSum | None = None
        self.failed = ""
        """Why it gives no sum."""
        self.result: CohortSum | None = None
        """What it gives."""

    @property
    def gathers(self) -> bool:
        """Whether devices may still join."""
        return self._at == 0 and not self.failed and len(self._heard[0]) < self._masking.cohort

    @property
    def over(self) -> bool:
        """Whether it has its sum, or gives none."""
        return bool(self.failed) or self.result is not None

    @property
    def size(self) -> int:
        """Bytes of its sum."""
        return 8 * self._numbers

    def ended_by(self, now: float) -> bool:
        """Whether it has been over, or nobody's, for long."""
        return now > self._until + 2 * self._masking.seconds

    def hear(
        self, device: str, key: EllipticCurvePublicKey, step: Step, body: str, tensors: Buffer, now: float
    ) -> Said:
        """A device, whose `key` its token names, takes a step.

        Raises MaskingRefused for what this device may not say; MalformedTensors for its vector.
        """
        self.tick(now)
        at = STEPS.index(step)
        digest = sha256(b"%d\0" % len(body) + body.encode() + bytes(tensors)).digest()
        before = self._heard[at].get(device)
        if before is None and not self.over and at == self._at and (at == 0 or device in self._expected):
            self._take(device, key, step, body, tensors)
            self._heard[at][device] = digest
            self._bodies[device] = body
            self.tick(now)
        elif before is not None and before != digest:
            raise MaskingRefused(f"the device has said something else in the step {step} before")
        elif before is None and not self.over:
            return Said(why="the cohort has gone on without this device")
        return self._next(device, at)

    def _next(self, device: str, at: int) -> Said:
        if self.result is not None:
            counted = device in self.result.devices
            return Said(why=COUNTED if counted else "the cohort has gone on without this device", counted=counted)
        if self.failed:
            return Said(why=self.failed)
        if at >= self._at:
            return Said(wait=True)
        if device not in self._outcomes[at]:
            return Said(why="the cohort has gone on without this device")
        return Said(step=STEPS[at + 1], body=self._outcomes[at][device])

    def tick(self, now: float) -> None:
        """Go on, if everyone has taken the step, or its time is over."""
        while not self.over:
            heard = self._heard[self._at]
            full = len(heard) == (self._masking.cohort if self._at == 0 else len(self._expected))
            if not full and now < self._until:
                return
            if len(heard) < self._masking.threshold:
                self.failed = f"{len(heard)} devices took the step {STEPS[self._at]}, fewer than the threshold"
                return
            try:
                self._advance(set(heard))
            except MaskingRefused as error:
                self.failed = f"the cohort has failed: {error.what}"
                return
            self._at += 1
            self._bodies = {}
            self._until = now + self._masking.seconds

    def _take(self, device: str, key: EllipticCurvePublicKey, step: Step, body: str, tensors: Buffer) -> None:
        """Check what a device says. Raises MaskingRefused, MalformedTensors: then the cohort has not heard it."""
        if step == "keys":
            if not self.gathers:
                raise MaskingRefused("the cohort is full")
            self._keys[device] = read_introduction(body)
            self._public[device] = key
            return
        round_, total = self._begun()
        if step == "shares":
            if set(read_shares(body)) != set(round_.graph[device]):
                raise MaskingRefused(f"{device} has not dealt to its neighbours")
        elif step == "vector":
            file = parse(tensors, max_size=masked_most(self._numbers), where="masked difference")
            if file.schema != masked_schema(self._numbers):
                raise MalformedTensors("it is no masked difference of the model", where="masked difference")
            total.fold(device, (file.array(VALUES), file.array(TAIL)))
        elif step == "survivors":
            if not is_signed(self._public[device], confirmation(round_, total.survivors), body):
                raise MaskingRefused(f"the signature of {device} is not over the survivors")
        else:
            read_shares(body)

    def _advance(self, heard: set[str]) -> None:
        if self._at == 0:
            keys = {name: self._keys[name] for name in heard}
            self._round = round_of(self._context, keys, self._masking.threshold)
            zeros = np.zeros(self._numbers, np.uint64), np.zeros(1, np.uint64)
            self._sum = MaskedSum(self._round, zeros)
            body = write_texts({name: keys[name].model_dump_json() for name in sorted(keys)})
            self._outcomes.append(dict.fromkeys(heard, body))
        else:
            round_, total = self._begun()
            bodies = self._bodies
            if self._at == 1:
                dealt = total.shares_for({name: read_shares(body) for name, body in bodies.items()})
                self._outcomes.append({name: write_shares(shares) for name, shares in dealt.items()})
            elif self._at == 2:
                body = write_texts(dict.fromkeys(total.survivors, ""))
                self._outcomes.append(dict.fromkeys(total.survivors, body))
            elif self._at == 3:
                self._outcomes.append(dict.fromkeys(heard, write_texts(bodies)))
            else:
                values, tail = total.unmask({name: read_shares(body) for name, body in bodies.items()})
                _, weight = read_tail(tail.view(np.uint64), len(round_.keys))
                numbers = self._masking.fixed_point(len(round_.keys)).read(values, 1.0)
                self.result = CohortSum(total.survivors, numbers.astype(np.float64, copy=False), weight)
                self._sum = None
        self._expected = heard

    def _begun(self) -> tuple[Round, MaskedSum]:
        if self._round is None or self._sum is None:
            raise MaskingRefused("the cohort has not begun, or is over")
        return self._round, self._sum
