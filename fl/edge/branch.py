"""The state of a gateway or an inner node in one job: the versions that are alive, and what came for them. No I/O.

Rules:
- A contribution counts once in the whole tree. A gateway cannot know what another has had, so it holds an update until
  the root has said that nobody claimed its contribution before (`claims`, `settle`); then it is folded, and its memory
  is free. What waits is bounded by `held_bytes`.
- `take` hands over everything that was folded since the last `take`, once; whoever takes it sends it until its parent
  has it. What a gateway has not handed over when it is killed is lost; the root knows which claims these were.
- What is for a version that is alive no more is dropped, and counted in `dropped`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fl.edge.contract import EdgeJob, ModelVersion, Tensors, Update, UpdateBounds, Verdict
from fl.edge.partial_sum import MAX_IDS, PartialSum, VersionSum, float_schema
from fl.edge.permits import Demand, Permits
from fl.edge.settings import EdgeSettings
from fl.edge.task import DeviceTask
from fl.guard.gate import MAX_MAGNITUDE
from fl.tensors import Schema

HELD_BYTES: Final = 64 << 20
TASK_SECONDS: Final = 600.0
_CONTRIBUTION: Final = re.compile(r"[0-9a-f]{64}")


class TreeBranch:
    """One job at one node of the tree (`fl.edge.contract.Branch`). For one thread at a time."""

    def __init__(
        self,
        job: EdgeJob,
        schema: Schema,
        origin: str,
        clock: Callable[[], float],
        *,
        held_bytes: int = HELD_BYTES,
        task_seconds: float = TASK_SECONDS,
    ) -> None:
        """`schema` is the model's; `origin` a random name (32 hex digits) of this start of the node; `clock` runs on,
        in seconds. A device has `task_seconds` for a task; then another may have one in its place."""
        self._job = job
        self.schema = float_schema(schema)
        self.origin = origin
        self._clock = clock
        self._held_bytes = held_bytes
        self._versions: dict[int, ModelVersion] = {}
        self._tasks: dict[str, DeviceTask] = {}
        self._sums: dict[int, VersionSum] = {}
        self._seen: dict[int, set[bytes]] = {}
        self._held: dict[bytes, tuple[Update, float]] = {}  # with its scale
        self._size_of_held = 0
        self._reserved: dict[bytes, tuple[int, bool]] = {}  # for sums: the version, and whether it is admitted
        self._asked: set[bytes] = set()  # of the held and reserved: those of which the parent was asked
        self._sequence = 0
        self.over = False
        """Whether the job is over: devices are told so."""
        self.permits = Permits(task_seconds)
        """Tasks that this gateway may give."""
        self._waiting = 0  # devices that asked for a task since the last exchange and got none
        self.dropped = 0
        """Contributions that were counted here and then lost, since their version was alive no more."""

    # for devices

    @property
    def job(self) -> EdgeJob:
        """The job."""
        return self._job

    def current(self) -> list[ModelVersion]:
        """The versions that are alive, oldest first; a device is given the last one."""
        return [self._versions[version] for version in sorted(self._versions)]

    def select(self, device: str) -> ModelVersion | None:
        """The version that this device is to train now; None: it shall ask again later.

        Which device it is makes no difference: permits are for any (docs/adr/0037).
        """
        if self.over or not self._versions or not self.permits.take(self._clock()):
            self._waiting += 1
            return None
        return self._versions[max(self._versions)]

    def task(self, digest: str) -> DeviceTask | None:
        """The task with this digest."""
        return self._tasks.get(digest)

    def add(self, update: Update) -> Verdict:
        """Take one device's update. Its arrays are kept until its claim is settled, and must not change."""
        seen = self._seen.get(update.version)
        if seen is None:
            self.permits.give_back()  # its device is free all the same
            return "stale"
        if (why := self._why_refused(update)) is not None:
            return f"refused: {why}"
        norm = norm_of(update.tensors)
        if not norm <= MAX_MAGNITUDE:
            return "refused: it holds a number that is not finite, or too large"
        contribution = bytes.fromhex(update.contribution)
        if contribution in seen or contribution in self._held:
            return "duplicate"
        size = _size(update.tensors)
        if self._size_of_held + size > self._held_bytes or len(seen) >= MAX_IDS:
            return "busy"
        seen.add(contribution)
        most = self._job.bounds.max_norm
        self._held[contribution] = update, 1.0 if most is None or norm <= most else most / norm
        self._size_of_held += size
        self.permits.give_back()
        return "counted"

    def reserve(self, version: int, contribution: str) -> Verdict:
        """Claim a contribution of which only a sum will come."""
        seen, raw = self._seen.get(version), bytes.fromhex(contribution)
        if seen is None:
            return "stale"
        if (reserved := self._reserved.get(raw)) is not None:
            return "admitted" if reserved[1] else "waiting"
        if raw in seen:
            return "duplicate"
        if len(seen) >= MAX_IDS:
            return "busy"
        seen.add(raw)
        self._reserved[raw] = version, False
        return "waiting"

    def add_sum(
        self, version: int, contributions: Sequence[str], tensors: Mapping[str, npt.NDArray[np.float64]], weight: float
    ) -> bool:
        """Add a sum of contributions that were admitted."""
        ids = {bytes.fromhex(contribution) for contribution in contributions}
        for _ in ids:
            self.permits.give_back()
        if version not in self._versions:
            return False
        if not all(self._reserved.get(one) == (version, True) for one in ids):
            raise ValueError("a contribution of a sum was not admitted")
        total = self._sum_of(version)
        for name, array in total.sums.items():
            array += tensors[name]
        total.weight += weight
        total.ids |= ids
        for one in ids:
            del self._reserved[one]
        return True

    def _why_refused(self, update: Update) -> str | None:
        if not _CONTRIBUTION.fullmatch(update.contribution):
            return "its contribution has no id"
        if not 0 < update.weight < math.inf:
            return f"its weight {update.weight:g} is not above 0"
        if update.tensors.keys() != self.schema.keys():
            return "its tensors are not those of the model"
        for name, spec in self.schema.items():
            array = update.tensors[name]
            if array.shape != spec.shape or array.dtype.kind != "f":
                return f"tensor {name!r} is {array.dtype} {list(array.shape)}, not floats of {list(spec.shape)}"
        return None

    # between this node and its parent

    def claims(self) -> dict[int, list[bytes]]:
        """The contributions that wait, by version, ascending: ask the parent which of them were claimed before."""
        found: dict[int, list[bytes]] = {}
        for contribution, (update, _) in self._held.items():
            found.setdefault(update.version, []).append(contribution)
            self._asked.add(contribution)
        for contribution, (version, admitted) in self._reserved.items():
            if not admitted:
                found.setdefault(version, []).append(contribution)
                self._asked.add(contribution)
        return {version: sorted(ids) for version, ids in sorted(found.items())}

    def settle(self, duplicates: Iterable[bytes]) -> None:
        """The parent has answered the last `claims`: fold what nobody else claimed, drop the rest."""
        others = set(duplicates)
        for contribution in list(self._held):  # in the order of arrival, so that equal runs have equal sums
            if contribution not in self._asked:
                continue
            update, scale = self._held.pop(contribution)
            self._size_of_held -= _size(update.tensors)
            if contribution not in others:
                weight = min(update.weight, self._job.bounds.max_weight)
                self._sum_of(update.version).fold(contribution, update.tensors, weight, scale=scale)
        for contribution, (version, _) in list(self._reserved.items()):
            if contribution in self._asked and contribution in others:
                del self._reserved[contribution]  # it stays among those that were seen
            elif contribution in self._asked:
                self._reserved[contribution] = version, True
        self._asked.clear()

    def _sum_of(self, version: int) -> VersionSum:
        found = self._sums.get(version)
        if found is None:
            found = self._sums[version] = VersionSum(self.schema)
        return found

    def merge(self, partial: PartialSum) -> None:
        """Add a child's partial sum, whose contributions the root has admitted; versions that are over are dropped."""
        for version, part in partial.versions.items():
            if version in self._versions:
                self._sum_of(version).merge(part)
            else:
                self.dropped += part.count

    def take(self) -> PartialSum | None:
        """Everything that was folded or merged since the last time; None if that is nothing. It is the caller's."""
        if not self._sums:
            return None
        versions, self._sums = self._sums, {}
        partial = PartialSum(self.origin, self._sequence, versions)
        self._sequence += 1
        return partial

    def advance(self, versions: Sequence[ModelVersion], tasks: Mapping[str, DeviceTask] | None = None) -> None:
        """These versions are alive now, and these tasks may be asked for. What waits for others is dropped."""
        alive = {one.version: one for one in versions}
        for version in self._versions.keys() - alive.keys():
            lost = self._sums.pop(version, None)
            self.dropped += 0 if lost is None else lost.count
            for contribution in self._seen.pop(version):
                held = self._held.pop(contribution, None)
                if held is not None:
                    self._size_of_held -= _size(held[0].tensors)
                    self.dropped += 1
        self._reserved = {one: held for one, held in self._reserved.items() if held[0] in alive}
        self._asked &= self._held.keys() | self._reserved.keys()
        for version in alive.keys() - self._versions.keys():
            self._seen[version] = set()
        self._versions = alive
        if tasks is not None:
            self._tasks = dict(tasks)

    def grant(self, total: int) -> None:
        """The parent has granted so many permits since this node's start."""
        self.permits.grant(total, self._clock())

    def demand(self) -> Demand:
        """What to tell the parent of tasks."""
        self.permits.expire(self._clock())
        waiting, self._waiting = self._waiting, 0
        return Demand(self.permits.returned, waiting)


def bounds_of(settings: EdgeSettings) -> UpdateBounds:
    """What one device may contribute: with privacy, its clip norm and the weight 1."""
    private = settings.privacy
    if private is not None:
        return UpdateBounds(private.clip_norm, 1.0)
    return UpdateBounds(settings.max_norm, settings.max_weight)


def norm_of(tensors: Tensors) -> float:
    """The L2 norm over all tensors, in float64; NaN or infinity if any number is not finite."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for array in tensors.values():
            flat = array.reshape(-1).astype(np.float64, copy=False)
            total += float(np.einsum("i,i->", flat, flat))  # BLAS would wake its threads for so little
    return math.sqrt(total) if total >= 0 else math.nan


def _size(tensors: Tensors) -> int:
    return sum(array.nbytes for array in tensors.values())
