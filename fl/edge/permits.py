"""How many tasks are under way: permits that the root deals out, instead of a list of named devices.

A permit lets a gateway give one device a task. Devices stay anonymous to the tree, and the root needs no memory of
those that wait. All numbers between parent and child are totals since the child's start, so that a message that is lost
or comes twice changes nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """What a child tells its parent: tasks that came back (reported or given up) so far, devices that wait now."""

    returned: int = 0
    waiting: int = 0


class Permits:
    """A gateway's: tasks that it may give, each back at the latest after `seconds`. Times are its own clock's."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._granted = 0
        self._given = 0
        self._open: deque[float] = deque()  # when each open task is given up, ascending
        self.returned = 0
        """Tasks that came back so far."""
        self.given_up = 0
        """Of these: those of which no update came in time."""

    def grant(self, total: int) -> None:
        """The parent has granted so many since the start."""
        self._granted = max(self._granted, total)

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
        """Give up the tasks of devices that have vanished."""
        while self._open and self._open[0] <= now:
            self._open.popleft()
            self.returned += 1
            self.given_up += 1
