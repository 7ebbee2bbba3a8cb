"""The export gate: whatever leaves a guest in a job is asked of the charter's rules (`policies/export.rego`) first.

It stands outside the sandbox, after the checks of `fl.guard.gate`, and is the one way out: what the rules refuse ends
the guest's part in the job, with the rule's sentence. Nothing is left out silently.
"""

from __future__ import annotations

import threading

from fl.errors import ExportRefused
from fl.jobs.record import JobRecord
from fl.party import Party
from policies.questions import ExportKind, Place, export_reasons

NUMBER_SIZE = 8
"""Bytes of a number beside its name."""


class ExportGate:
    """Decides for one guest in one job. Safe to use from several threads.

    A yes holds until the next round for things of the same kind, size and receiver, so that a script which logs a
    thousand numbers asks once; a new version of the charter is asked anew.
    """

    def __init__(self, party: Party, job: JobRecord, here: Place) -> None:
        self._party = party
        self._job = job.model_dump(mode="json")
        self._here = here
        self._lock = threading.Lock()
        self._allowed: set[tuple[object, ...]] = set()

    def begin_round(self) -> None:
        """Ask everything anew from now on."""
        with self._lock:
            self._allowed.clear()

    def let_out(self, kind: ExportKind, size: int, to: tuple[str, str], *, sealed: bool = False) -> None:
        """Ask whether `size` bytes of `kind` may go to `to` (role and name). Raises ExportRefused with every reason."""
        charter = self._party.charter()
        question = (charter.version, kind, size, to, sealed)
        with self._lock:
            if question in self._allowed:
                return
        at = self._party.clock()
        reasons = export_reasons(charter, self._job, kind, size, here=self._here, to=to, at=at, sealed=sealed)
        if reasons:
            raise ExportRefused(kind, "/".join(self._here), reasons)
        with self._lock:
            self._allowed.add(question)


def size_of_numbers(named: dict[str, float]) -> int:
    """Bytes of named numbers: their names in UTF-8, and NUMBER_SIZE each."""
    return sum(len(name.encode("utf-8")) + NUMBER_SIZE for name in named)
