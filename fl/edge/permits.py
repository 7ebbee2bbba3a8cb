"""How many tasks are under way: permits that the root deals out, instead of a list of named devices.

A permit lets a gateway give one device a task. Devices stay anonymous to the tree, and the root needs no memory of
those that wait. All numbers between parent and child are totals since the child's start, so that a message that is lost
or comes twice changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Demand:
    """What a child tells its parent: permits that it has used or given up so far, devices that wait now."""

    returned: int = 0
    waiting: int = 0


class Permits:
    """A gateway's: tasks that it may give, each back at the latest after `seconds`. Times are its own clock's."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._granted = 0
        self._given = 0
        self._open: deque[float] = deque()  # when each open task is given up, ascending
        self._unused_until = 0.0
        self.returned = 0
        """Permits that came back so far: by a report, since a device vanished, or since none asked."""
        self.given_up = 0
        """Tasks of which no report came in time."""

    def grant(self, total: int, now: float) -> None:
        """The parent has granted so many since the start."""
        if total > self._granted:
            self._granted = total
            self._unused_until = now + self._seconds

    @property
    def left(self) -> int:
        """Tasks that may be given now."""
        return self._granted - self._given

    @property
    def under_way(self) -> int:
        """Tasks that devices have."""
        return len(self._open)

    def take(self, now: float) -> bool:
        """Give a task; False if none may be given."""
        self.expire(now)
        if self.left <= 0:
            return False
        self._given += 1
        self._open.append(now + self._seconds)
        return True

    def give_back(self) -> None:
        """A device has reported. Its task counts as the oldest: which one it was makes no difference to the number."""
        if self._open:
            self._open.popleft()
            self.returned += 1

    def expire(self, now: float) -> None:
        """Give up the tasks of devices that have vanished, and permits that no device asked for."""
        while self._open and self._open[0] <= now:
            self._open.popleft()
            self.returned += 1
            self.given_up += 1
        if self.left > 0 and now >= self._unused_until:
            self.returned += self.left
            self._given = self._granted


@dataclass(slots=True)
class _Child:
    granted: int = 0
    returned: int = 0
    waiting: int = 0
    gone: bool = False


class Deal:
    """A parent's: how permits are dealt to children. Pure but for the generator that "random" draws from."""

    def __init__(self, strategy: str, generator: np.random.Generator) -> None:
        """`strategy`: "balanced", evenly, or "random", as if devices were drawn (`DeviceManagerConfig`)."""
        self._strategy: Callable[[int], dict[str, int]] = self._drawn if strategy == "random" else self._even
        self._generator = generator
        self._children: dict[str, _Child] = {}

    def report(self, child: str, demand: Demand) -> None:
        """A child tells its demand."""
        one = self._children.setdefault(child, _Child())
        one.returned = min(max(one.returned, demand.returned), one.granted)
        one.waiting = demand.waiting
        one.gone = False

    def drop(self, child: str) -> None:
        """A child is gone: what it had comes back. If it returns it goes on with its totals."""
        gone = self._children.get(child)
        if gone is not None:
            gone.returned, gone.waiting, gone.gone = gone.granted, 0, True

    @property
    def children(self) -> int:
        """How many there are."""
        return sum(1 for one in self._children.values() if not one.gone)

    @property
    def waiting(self) -> int:
        """Devices that wait."""
        return sum(one.waiting for one in self._children.values())

    @property
    def under_way(self) -> int:
        """Permits that are out."""
        return sum(one.granted - one.returned for one in self._children.values())

    @property
    def returned(self) -> int:
        """Permits that came back so far, also from children that are gone."""
        return sum(one.returned for one in self._children.values())

    @property
    def granted(self) -> int:
        """Permits that were given to children so far."""
        return sum(one.granted for one in self._children.values())

    def give(self, permits: int) -> None:
        """Deal at most so many more to the children whose devices wait."""
        for child, count in self._strategy(max(0, permits)).items():
            one = self._children[child]
            one.granted += count
            one.waiting -= count

    def granted_to(self, child: str) -> int:
        """The total that a child has been granted since its start."""
        return self._children[child].granted

    def _even(self, permits: int) -> dict[str, int]:
        shares: dict[str, int] = {}
        open_ones = {child: one.waiting for child, one in sorted(self._children.items()) if one.waiting > 0}
        while permits and open_ones:
            share = max(1, permits // len(open_ones))
            # Those with the fewest under way first, so that a remainder evens out.
            for child in sorted(open_ones, key=self._under_way_of):
                taken = min(share, open_ones[child], permits)
                shares[child] = shares.get(child, 0) + taken
                permits -= taken
                open_ones[child] -= taken
            open_ones = {child: left for child, left in open_ones.items() if left}
        return shares

    def _under_way_of(self, child: str) -> int:
        return self._children[child].granted - self._children[child].returned

    def _drawn(self, permits: int) -> dict[str, int]:
        names = sorted(child for child, one in self._children.items() if one.waiting > 0)
        if not names:
            return {}
        waiting = [self._children[name].waiting for name in names]
        drawn = self._generator.multivariate_hypergeometric(waiting, min(permits, sum(waiting)), method="marginals")
        return dict(zip(names, map(int, drawn), strict=True))
