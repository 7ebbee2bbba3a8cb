"""What happens to a job at the server, as its users read it: its record so far, its events, its state.

The job's thread and the sites' calls write, any number of watchers read as it comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Final

from fl.jobs.progress import JobEvent, Status
from fl.jobs.record import JobRecord
from fl.jobs.results import JobHistory
from fl.jobs.settings import JobSettings
from fl.transport.frames import JobReport

REPORTED_SITES: Final = 300
"""A report tells of so many sites, of those that are lost first."""
MAX_EVENTS: Final = 200_000
"""A job keeps so many events for those who watch it; of logged values beyond, only the tracking knows."""


class Journal:
    """Safe to use from many threads."""

    def __init__(self, record: JobRecord, settings: JobSettings, received: datetime) -> None:
        """The job waits to be run since `received`."""
        self.history = JobHistory(record.job, settings, received)
        self.history.status = Status.QUEUED
        self.tracking: Callable[[JobEvent], None] | None = None
        """Sees every event too, while it is there."""
        self._record = record
        self._events: list[JobEvent] = []
        self._changed = threading.Condition()

    @property
    def status(self) -> Status:
        """Where the job is in its life."""
        return self.history.status

    @property
    def events(self) -> list[JobEvent]:
        """What has happened so far."""
        with self._changed:
            return list(self._events)

    def restore(self, events: Sequence[JobEvent]) -> None:
        """Take over what a server of before has seen of a job that is over."""
        for event in events:
            self.history.observe(event)
        self._events = list(events)

    def observe(self, event: JobEvent) -> None:
        """Write an event down."""
        with self._changed:
            self.history.observe(event)
            if event.kind not in {"value", "line"} or len(self._events) < MAX_EVENTS:
                self._events.append(event)
            tracking = self.tracking
            if tracking is not None:
                tracking(event)
            self._changed.notify_all()

    def set_status(self, status: Status) -> None:
        """The job is somewhere else in its life."""
        with self._changed:
            self.history.status = status
            self._events.append(JobEvent(kind="status", text=status.value))
            self._changed.notify_all()

    def report(self, *, details: bool = True) -> JobReport:
        """The job's state, for its users; `details` adds what became of each site, and the reasons."""
        history = self.history
        with self._changed:
            told = sorted(history.sites.items(), key=lambda item: item[1] == "in the job") if details else []
        sites = {name: state[:300] for name, state in told[:REPORTED_SITES]}
        return JobReport(
            job=self._record.job,
            name=history.settings.name,
            status=history.status,
            submitter=self._record.submitter,
            created=self._record.created,
            round=history.rounds[-1]["round"] if history.rounds else None,
            num_rounds=history.settings.num_rounds,
            sites=sites,
            reasons=tuple(reason[:1000] for reason in history.reasons[:64]) if details else (),
        )

    def state_of(self, site: str) -> str:
        """What became of a site of the roster, in short."""
        with self._changed:
            return self.history.sites.get(site, self.status.value)[:100]

    def watch(self, *, alive: Callable[[], bool]) -> Iterator[JobEvent]:
        """The job's events from its beginning, as they come, until it is over or the watcher is gone."""
        at = 0
        while True:
            with self._changed:
                while at >= len(self._events) and not self.status.over and alive():
                    self._changed.wait(5.0)
                fresh = self._events[at:]
                over = self.status.over and at + len(fresh) >= len(self._events)
            yield from fresh
            at += len(fresh)
            if over or not alive():
                return

    def wake(self) -> None:
        """Let watchers look whether they are still alive."""
        with self._changed:
            self._changed.notify_all()
