"""What a gateway's service and the tree above it say to each other (docs/adr/0036-devices-speak-in-sealed-messages.md).

The service knows devices, seals and bounds; a `Branch` knows model versions and sums. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from attestation.canonical import canonical_bytes

if TYPE_CHECKING:
    from fl.edge.task import DeviceTask

MAX_VERSION: Final = 1 << 31
ID_BYTES: Final = 32
"""Bytes of a contribution id."""

Verdict = str
"""What became of an update: `counted`, `duplicate`, `stale`, `busy` (there is no room: again later), or `refused: ` and
why."""
Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Update:
    """One device's update to one model version, opened and checked by the gateway.

    `tensors` are float32 differences to the version's model, each of its tensor's shape; `weight` is what they count
    for, above 0. `contribution` is `contribution_id`: equal for all that one device sends to one version of a job, so
    that it counts once.
    """

    version: int
    tensors: Tensors = field(repr=False)
    weight: float
    contribution: str


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A model that devices train from: `model` is a safetensors file, `digest` its SHA-256, `task` what they run."""

    version: int
    digest: str
    model: bytes = field(repr=False)
    task: str


@dataclass(frozen=True, slots=True)
class UpdateBounds:
    """What any one device may contribute: the L2 norm of all its tensors together (larger is scaled down; None: any),
    and weight (more counts as this)."""

    max_norm: float | None = None
    max_weight: float = 1e6


@dataclass(frozen=True, slots=True)
class EdgeJob:
    """What a device is told of a job. `capabilities`: those that a device must have, with these values."""

    job: str
    name: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    capabilities: Mapping[str, str] = field(default_factory=dict)
    bounds: UpdateBounds = UpdateBounds()
    device_reuse: bool = True
    """Whether a device may contribute to several versions; False: once in the whole job."""


class Branch(Protocol):
    """One job at one gateway. Called from one thread; never waits."""

    @property
    def job(self) -> EdgeJob:
        """The job."""

    @property
    def origin(self) -> str:
        """A random name of this beginning of the job here: with another, nothing of the one before counts."""

    @property
    def over(self) -> bool:
        """Whether the job is over: devices are told DONE."""

    def current(self) -> Sequence[ModelVersion]:
        """The versions to which updates still count, the newest last."""

    def select(self, device: str) -> ModelVersion | None:
        """The version that this device is to train now; None if it is not wanted now (`device`: a stable id)."""

    def task(self, digest: str) -> DeviceTask | None:
        """The task with this digest."""

    def add(self, update: Update) -> Verdict:
        """Take an update, whose arrays are the branch's from now on; scales it down to the job's norm."""

    def reserve(self, version: int, contribution: str) -> Verdict:
        """Claim a contribution that will be part of a sum: `waiting` until the claim is settled, then `admitted`, as
        often as it is asked; else `duplicate`, `stale` or `busy`."""

    def add_sum(
        self, version: int, contributions: Sequence[str], tensors: Mapping[str, npt.NDArray[np.float64]], weight: float
    ) -> bool:
        """Add a sum of weighted differences of admitted contributions; False if its version is trained no more."""


def contribution_of(job: EdgeJob, version: int, device: str) -> str:
    """The contribution of a device to a version of a job: in one that takes each device once, to whichever version."""
    return contribution_id(job.job, version if job.device_reuse else 0, device)


def contribution_id(job: str, version: int, device: str) -> str:
    """The hex SHA-256 under which a device's update to a version counts once."""
    said = {"device": device, "job": job, "version": version}
    return sha256(b"sealwright-contribution-v1\0" + canonical_bytes(said)).hexdigest()
