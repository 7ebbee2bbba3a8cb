"""What passes between devices, gateways and the tree: a device's update, and a version of the model with its task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import numpy.typing as npt

from fl.model import MAX_WEIGHT
from fl.tensors import FLOATS, Schema
from fl.transport.memory import SealedMemory
from policies.errors import Unusable

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

CONTRIBUTION_ID: Final = re.compile(r"[0-9a-f]{32}")
ID_BYTES: Final = 16
MAX_VERSION: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Update:
    """What one device made of one version of the model.

    `tensors` holds the difference from that version's model for exactly its tensors of floats (`float_schema`), each of
    the model's shape, as float16, float32 or float64. `contribution` names this one contribution, whichever gateway it
    reaches and however often: 32 hex digits that follow from device and version (`fl.edge.contract.contribution_id`),
    so that a device counts once a version. `weight` is usually the number of examples.

    Raises Unusable if a field is out of its range.
    """

    version: int
    tensors: Arrays = field(repr=False)
    weight: float
    contribution: str

    def __post_init__(self) -> None:
        if not 0 <= self.version < MAX_VERSION:
            raise Unusable(f"version {self.version} is none", where="update", do="Send the version of the task.")
        if not 0 < self.weight <= MAX_WEIGHT:
            raise Unusable(
                f"the weight {self.weight} is not above 0 and at most {MAX_WEIGHT:.0f}",
                where="update",
                do="Send the number of examples.",
            )
        if not CONTRIBUTION_ID.fullmatch(self.contribution):
            raise Unusable("a contribution's id is not 32 hex digits", where="update", do="Derive it as documented.")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version of the model that devices may train: its bytes (one safetensors file), and the task that does it.

    `digest` is the model's lower-case hex SHA-256; `task_digest` that of the training graph and its configuration,
    which a device looks up in the charter before it runs them. `settings` is what a device needs to know beside.
    """

    version: int
    digest: str
    model: SealedMemory = field(repr=False)
    task_digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)


OutcomeKind: TypeAlias = Literal["counted", "duplicate", "stale", "refused", "busy"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an update.

    - `counted`: it is in the sum, or waits to be.
    - `duplicate`: this contribution was here before; its device is told the same as the first time.
    - `stale`: its version is trained no more.
    - `refused`: it is not of the model, not finite, or too heavy; `why` says it.
    - `busy`: there is no room for it now; the device sends it again later.
    """

    kind: OutcomeKind
    why: str = ""


def float_schema(schema: Schema) -> Schema:
    """The tensors of floats of a model: those that updates have."""
    return {name: spec for name, spec in schema.items() if spec.dtype in FLOATS}
