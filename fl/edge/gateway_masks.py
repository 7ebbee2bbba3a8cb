"""The cohorts of a gateway: who is in which, and what becomes of their sums. Pure, but for the branch that it calls.

A contribution is claimed before its device joins a cohort, since nobody can take it out of a masked sum again
(docs/adr/0037): what is in a sum that is handed on, nobody has claimed before.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fl.edge.cohort import MAX_OPEN, Cohort, CohortSum, Said
from fl.edge.contract import Branch, contribution_of
from fl.edge.masks import DeviceMasking, context_of, introduced, read_introduction
from fl.edge.messages import MaskRequest
from fl.edge.tokens import Device
from fl.errors import MaskingRefused
from fl.tensors import Buffer, Schema

if TYPE_CHECKING:
    from policies.charter import Charter

_Place = tuple[str, int]


class Cohorts:
    """All of them at one gateway. For one thread. Times are the gateway's running clock's."""

    def __init__(self) -> None:
        self._open: dict[_Place, list[Cohort]] = {}
        self._of: dict[tuple[str, int, str], Cohort] = {}

    def hear(
        self,
        device: Device,
        branch: Branch,
        request: MaskRequest,
        tensors: Buffer,
        *,
        masking: DeviceMasking,
        schema: Schema,
        charter: Charter,
        at: datetime,
        now: float,
    ) -> Said:
        """What a device is told that takes a step; the sum of a cohort that is whole goes to the branch.

        `schema`: the model's tensors of floats. Raises MaskingRefused and Refused for what this device may not say,
        MalformedTensors for its vector.
        """
        self._sweep(now)
        mine = (request.job, request.version, device.name)
        cohort = self._of.get(mine)
        if cohort is None:
            if request.step != "keys":
                return Said(why="this gateway has no cohort with this device")
            verdict = branch.reserve(request.version, contribution_of(branch.job, request.version, device.name))
            if verdict != "admitted":
                return Said(wait=True) if verdict in ("waiting", "busy") else Said(why=verdict)
            context = context_of(charter.id, request.job, request.version, request.task)
            name, _ = introduced(read_introduction(request.body), charter, at, job=branch.job.name, context=context)
            if name != device.name:
                raise MaskingRefused("a device introduces itself as another")
            cohort = self._gathering((request.job, request.version), masking, context, schema, now)
            if cohort is None:
                return Said(wait=True)
            self._of[mine] = cohort
        whole = cohort.result is None
        said = cohort.hear(device.name, device.key, request.step, request.body, tensors, now)
        if whole and cohort.result is not None:
            self._deliver(branch, request.version, cohort.result, schema)
        if said.why and not said.counted:
            self._of.pop(mine, None)
        return said

    def _gathering(
        self, place: _Place, masking: DeviceMasking, context: bytes, schema: Schema, now: float
    ) -> Cohort | None:
        """The cohort that gathers, or a new one; None if there is no room for it."""
        for cohort in self._open.get(place, []):
            if cohort.gathers:
                return cohort
        made = Cohort(masking, context, sum(spec.elements for spec in schema.values()), now)
        if made.size + sum(cohort.size for cohort in self._all()) > MAX_OPEN:
            return None
        self._open.setdefault(place, []).append(made)
        return made

    def _deliver(self, branch: Branch, version: int, total: CohortSum, schema: Schema) -> None:
        ids = [contribution_of(branch.job, version, device) for device in total.devices]
        tensors: dict[str, npt.NDArray[np.float64]] = {}
        begin = 0
        for name in sorted(schema):
            end = begin + schema[name].elements
            tensors[name] = total.values[begin:end].reshape(schema[name].shape)
            begin = end
        branch.add_sum(version, ids, tensors, total.weight)

    def _all(self) -> Iterator[Cohort]:
        for cohorts in self._open.values():
            yield from cohorts

    def _sweep(self, now: float) -> None:
        """Forget the cohorts of which nothing has been heard for long."""
        if not any(cohort.ended_by(now) for cohort in self._all()):
            return
        for place, cohorts in list(self._open.items()):
            self._open[place] = [cohort for cohort in cohorts if not cohort.ended_by(now)]
            if not self._open[place]:
                del self._open[place]
        self._of = {mine: cohort for mine, cohort in self._of.items() if not cohort.ended_by(now)}
