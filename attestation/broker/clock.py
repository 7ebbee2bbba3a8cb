"""The broker's clock, which decides over freshness: a jump is noticed, and nothing is decided until it is set right.

Two clocks are compared: the wall clock, which people and programs set, and the one that only runs on (CLOCK_BOOTTIME).
Before that, the ledger's last entry: a broker that starts in the past of its own ledger has a wrong clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from attestation.canonical import format_time
from attestation.errors import BrokerUnavailable

TOLERANCE: Final = timedelta(seconds=60)


def now() -> datetime:
    """The time, UTC, in the whole seconds that every signed document has."""
    return datetime.now(UTC).replace(microsecond=0)


def running_seconds() -> float:
    """Seconds that have passed, sleep included, by a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class CheckedClock:
    """The wall clock, as long as it agrees with what came before."""

    def __init__(
        self,
        last_entry: datetime | None = None,
        *,
        wall: Callable[[], datetime] = now,
        running: Callable[[], float] = running_seconds,
    ) -> None:
        self._last_entry = last_entry
        self._wall = wall
        self._running = running
        self._start = wall(), running()

    def __call__(self) -> datetime:
        """The time. Raises BrokerUnavailable if the clock jumped or is behind the ledger."""
        at = self._wall()
        if self._last_entry is not None and at < self._last_entry - TOLERANCE:
            last = format_time(self._last_entry)
            what = f"the clock says {format_time(at)}, before the ledger's last entry ({last})"
            raise BrokerUnavailable(what, where="clock")
        wall, running = self._start
        drift = (at - wall) - timedelta(seconds=self._running() - running)
        if abs(drift) > TOLERANCE:
            what = f"the clock jumped by {drift.total_seconds():.0f} s since the broker was started"
            raise BrokerUnavailable(f"{what}; set it right, or restart if it is", where="clock")
        return at
