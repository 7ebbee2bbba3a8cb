"""What two tiers of the tree say to each other every moment, and what an inner node makes of it. Pure.

One exchange: a child reports what it claims, a partial sum of what was admitted before, and its demand of tasks; its
parent answers which claims are not to be folded, the permits granted since the child's start, and the versions that are
alive. An inner node hands its children's claims on, sums their sums, and deals its permits out. All of it may be said
again after a cut: the answer to a report is kept until the next one comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fl.edge.branch import TreeBranch
from fl.edge.contract import ModelVersion
from fl.edge.fedbuff import FedBuff
from fl.edge.partial_sum import PartialSum
from fl.edge.permits import Deal, Demand

Claims = Mapping[str, Mapping[int, Sequence[bytes]]]
"""Of which gateway's start, for which version, which contributions."""


@dataclass(frozen=True, slots=True)
class Report:
    """From a child: `origin` is its own start, `claims` are by the gateways' starts below it (or its own)."""

    origin: str
    demand: Demand
    claims: Claims = field(default_factory=dict)
    partial: PartialSum | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """To a child. `duplicates`: by origin, as the claims were; `alive`: the versions that take updates."""

    duplicates: Mapping[str, frozenset[bytes]]
    granted: int
    alive: tuple[int, ...]
    over: bool = False


class Gateway:
    """A gateway's side: a branch, and the report that its parent has not answered."""

    def __init__(self, branch: TreeBranch) -> None:
        self.branch = branch

    def report(self) -> Report:
        """What to say to the parent next. It has to come to the parent, and its reply to `hear`, before another."""
        claims = self.branch.claims()
        return Report(
            self.branch.origin,
            self.branch.demand(),
            {self.branch.origin: claims} if claims else {},
            self.branch.take(),
        )

    def hear(self, reply: Reply, versions: Mapping[int, ModelVersion]) -> None:
        """The parent's reply; `versions` has all that it names as alive."""
        branch = self.branch
        branch.settle(reply.duplicates.get(branch.origin, ()))
        branch.advance([versions[version] for version in reply.alive])
        branch.grant(reply.granted)
        branch.over = reply.over


class InnerNode:
    """An inner node: children's reports go into `take`, the sum of all into `report`, its reply into `hear`."""

    def __init__(self, branch: TreeBranch, strategy: str, generator: np.random.Generator) -> None:
        self.branch = branch
        self._deal = Deal(strategy, generator)
        self._granted = 0
        self._claims: dict[str, dict[int, set[bytes]]] = {}
        self._last: dict[str, int] = {}

    def take(self, report: Report) -> None:
        """A child has reported."""
        self._deal.report(report.origin, report.demand)
        for origin, by_version in report.claims.items():
            into = self._claims.setdefault(origin, {})
            for version, ids in by_version.items():
                into.setdefault(version, set()).update(ids)
        partial = report.partial
        if partial is not None and partial.sequence > self._last.get(partial.origin, -1):
            self._last[partial.origin] = partial.sequence
            self.branch.merge(partial)

    def drop(self, child: str) -> None:
        """A child is gone."""
        self._deal.drop(child)

    def report(self) -> Report:
        """What to say to the parent next."""
        claims, self._claims = self._claims, {}
        said = {
            origin: {version: sorted(ids) for version, ids in sorted(by_version.items())}
            for origin, by_version in sorted(claims.items())
        }
        demand = Demand(self._deal.returned, self._deal.waiting)
        return Report(self.branch.origin, demand, said, self.branch.take())

    def hear(self, reply: Reply, versions: Mapping[int, ModelVersion]) -> None:
        """The parent's reply: permits are dealt out to the children."""
        self.branch.advance([versions[version] for version in reply.alive])
        self.branch.over = reply.over
        self._granted = max(self._granted, reply.granted)
        self._deal.give(self._granted - self._deal.granted)

    def reply_to(self, report: Report, duplicates: Mapping[str, frozenset[bytes]]) -> Reply:
        """A child's reply, when the parent has answered its claims with `duplicates` (all that are known)."""
        return Reply(
            {origin: duplicates.get(origin, frozenset()) for origin in report.claims},
            self._deal.granted_to(report.origin),
            tuple(one.version for one in self.branch.current()),
            self.branch.over,
        )


def root_reply(buff: FedBuff, report: Report) -> Reply:
    """The root's answer to a child's report, which it takes into account."""
    duplicates = {
        origin: frozenset(buff.contributions.claim(origin, by_version)) for origin, by_version in report.claims.items()
    }
    if report.partial is not None:
        buff.merge(report.partial)
    granted = buff.demand(report.origin, report.demand)
    return Reply(duplicates, granted, tuple(sorted(buff.models)), buff.over)
