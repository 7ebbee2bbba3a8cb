"""Users' commands in the ledger: who, what, which job, what came of it; bounded, so that nobody can flood it.

Each user has an allowance of entries, BURST at once and one more every REFILL_SECONDS. A command for which there is no
allowance is refused; how many were, the user's next entry tells. Who is no user of the charter shares one allowance
with all others of the kind. Looking on (`list`, `report`, `watch`) is written down once in WINDOW_SECONDS for each job,
with how often it was done before; everything else each time, before it has an effect.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fl.errors import CommandRefused
from policies.errors import Refused, SealwrightError

BURST: Final = 120
REFILL_SECONDS: Final = 2.0
WINDOW_SECONDS: Final = 60.0
LOOKING_ON: Final = frozenset({"list", "report", "watch"})
NOBODY: Final = "(no user)"
MAX_REASONS: Final = 16
MAX_REASON: Final = 300
MAX_WINDOWS: Final = 1000
"""Jobs of one user that are looked on at once without being written down again."""


@dataclass(slots=True)
class _Allowance:
    tokens: float
    since: float
    looked: dict[tuple[str, str | None], float] = field(default_factory=dict)
    repeated: int = 0
    unrecorded: int = 0


class CommandLog:
    """Writes commands into the ledger for one guest. Safe to use from several threads.

    `record` is the guest's (`Party.record`), `clock` counts seconds and never goes back.
    """

    def __init__(
        self,
        record: Callable[[str, Mapping[str, Any]], str],
        tell: Callable[[str], None],
        place: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`place` says in each entry where the command was decided: `{"server": NAME}` or `{"site": NAME}`."""
        self._record = record
        self._tell = tell
        self._place = dict(place)
        self._clock = clock
        self._lock = threading.Lock()
        self._allowances: dict[str, _Allowance] = {}

    def accepted(self, user: str, command: str, job: str | None, token: str) -> None:
        """Write down a command that is about to be done.

        `token` is the signed command, or the SHA-256 of a job's record. Raises CommandRefused if the user has no
        allowance left, and what the ledger raises if the entry is not there: then the command must not be done.
        """
        with self._lock:
            own = self._allowance(user)
            now = self._clock()
            if command in LOOKING_ON:
                if now < own.looked.get((command, job), float("-inf")) + WINDOW_SECONDS:
                    own.repeated += 1
                    return
                self._forget(own, now)
            told = self._take(own, user, command)
            if command in LOOKING_ON:
                own.looked[command, job] = now
        self._record("command", self._entry(user, command, job, "accepted", (), token, told))

    def refused(self, user: str | None, command: str, job: str | None, error: SealwrightError, token: str = "") -> None:
        """Write down a command that was refused, if there is allowance; never raises: the refusal stands anyway."""
        reasons = error.reasons if isinstance(error, Refused) else (error.what,)
        with self._lock:
            own = self._allowance(user or NOBODY)
            try:
                told = self._take(own, user or NOBODY, command)
            except CommandRefused:
                return
        try:
            self._record("command", self._entry(user or NOBODY, command, job, "refused", reasons, token, told))
        except SealwrightError as failure:
            self._tell(f"a refused command of {user or NOBODY} is not in the ledger: {failure.what}")

    def _allowance(self, user: str) -> _Allowance:
        return self._allowances.setdefault(user, _Allowance(BURST, self._clock()))

    def _take(self, own: _Allowance, user: str, command: str) -> dict[str, int]:
        """Spend one entry; what it is to tell of those before."""
        now = self._clock()
        own.tokens = min(float(BURST), own.tokens + (now - own.since) / REFILL_SECONDS)
        own.since = now
        if own.tokens < 1:
            own.unrecorded += 1
            raise CommandRefused(command, user, (f"{user} gives more commands than the ledger takes: wait a little",))
        own.tokens -= 1
        told = {"repeated": own.repeated, "unrecorded": own.unrecorded}
        own.repeated = own.unrecorded = 0
        return {name: count for name, count in told.items() if count}

    def _forget(self, own: _Allowance, now: float) -> None:
        if len(own.looked) >= MAX_WINDOWS:
            own.looked = {key: since for key, since in own.looked.items() if now < since + WINDOW_SECONDS}
        if len(own.looked) >= MAX_WINDOWS:
            own.looked.clear()

    def _entry(
        self,
        user: str,
        command: str,
        job: str | None,
        outcome: str,
        reasons: tuple[str, ...],
        token: str,
        told: Mapping[str, int],
    ) -> dict[str, Any]:
        shown = [reason[:MAX_REASON] for reason in reasons[:MAX_REASONS]]
        body: dict[str, Any] = {"command": command, "job": job, "outcome": outcome, "user": user, **self._place}
        if shown:
            body["reasons"] = shown
        if token:
            body["token"] = token
        return {**body, **told}
