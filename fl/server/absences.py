"""Who of a job's sites is away, how long each may be, and how the round's clock stands still meanwhile.

- While a site is away that the round waits for, the clock stands still; it goes on where it stood.
- A site that a cut keeps away, and without which enough are there, is waited for MISSED_SECONDS.
- In all, in one job, a site may be away for `pause_seconds`.

Times are seconds of a running clock, given by the caller, who also sees to it that one thread at a time is here.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final

MISSED_SECONDS: Final = 90.0
"""How long a round waits for a site that a cut keeps away and without which enough are there."""


class Absences:
    """`present`, where it is asked for, is how many sites are in the job, those that are away included."""

    def __init__(self, min_sites: int, pause_seconds: float) -> None:
        self._min_sites = min_sites
        self.pause_seconds = pause_seconds
        self._away: dict[str, float] = {}  # since when
        self._cut: set[str] = set()  # of these: those that nothing but the network keeps away
        self._absence: dict[str, float] = {}  # how long each was away so far
        self._missed: set[tuple[str, int]] = set()  # sites, and the rounds that went on without them
        self._deadline = 0.0
        self._stopped_at = 0.0  # since when the clock stands still, while a site is away

    @property
    def names(self) -> Set[str]:
        """The sites that are away."""
        return self._away.keys()

    def leave(self, name: str, now: float, *, cut: bool) -> None:
        """A site is away from now on."""
        self._away[name] = now
        if cut:
            self._cut.add(name)
        if len(self._away) == 1:
            self._stopped_at = now

    def come_back(self, name: str, now: float) -> None:
        """A site is not away any more; when none is, the clock goes on."""
        since = self._away.pop(name, None)
        self._cut.discard(name)
        if since is None:
            return
        self._absence[name] = self._absence.get(name, 0.0) + now - since
        if not self._away:
            self._deadline += now - self._stopped_at

    def was_away(self, name: str) -> bool:
        """Whether a site was away before."""
        return name in self._absence

    def miss(self, names: Set[str], round_: int) -> None:
        """A round goes on without these."""
        self._missed |= {(name, round_) for name in names}

    def missed(self, name: str, round_: int) -> bool:
        """Whether a round went on without this site."""
        return (name, round_) in self._missed

    def start(self, seconds: float, now: float) -> None:
        """The clock begins anew: what begins now may take so long."""
        self._deadline, self._stopped_at = now + seconds, now

    def waited_for(self, present: int, now: float) -> Set[str]:
        """The sites that are away and for which what is on waits."""
        spare = self._spare(present)
        return {name for name in self._away if spare.get(name, now + 1) > now}

    def next_look(self, present: int, now: float) -> float:
        """When somebody is waited for no more, or the time is over, unless something happens before."""
        limit = min((self._end_of(name) for name in self._away), default=self._deadline)
        if not self.waited_for(present, now):
            limit = min(limit, self._deadline)
        return min([limit, *(until for until in self._spare(present).values() if until > now)])

    def too_long(self, now: float) -> list[str]:
        """The sites that have been away for too long."""
        return [name for name in self._away if self._end_of(name) <= now]

    def over(self, present: int, now: float) -> bool:
        """Whether the time is over, which it never is while somebody is waited for."""
        return not self.waited_for(present, now) and now >= self._deadline

    def _spare(self, present: int) -> dict[str, float]:
        """Of sites without which enough are there: until when they are waited for."""
        enough = present - len(self._away) >= self._min_sites
        return {name: self._away[name] + MISSED_SECONDS for name in self._cut} if enough else {}

    def _end_of(self, name: str) -> float:
        return self._away[name] + max(0.0, self.pause_seconds - self._absence.get(name, 0.0))
