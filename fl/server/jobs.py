"""The jobs that a server knows: those that wait, run, or are over and are remembered a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from fl.errors import ApprovalRefused, SealedDataRefused
from fl.party import Party
from fl.server.attendance import Attendance
from fl.server.job import ServerJob
from fl.server.job_store import JobStore
from fl.transport.frames import Told
from policies.errors import SealwrightError

MAX_RUNNING: Final = 4
"""Jobs that run side by side; more wait in the queue."""
MAX_JOBS: Final = 200
"""Jobs that the server remembers; the oldest that are over go first."""
MAX_OPEN: Final = 32
"""Jobs that wait or run; more are not taken."""
KEPT_RESULTS: Final = 4 << 30
"""Bytes of sealed results that are kept for download; beyond, the oldest go, the newest never."""


class Jobs:
    """The jobs of one server. Safe to use from several threads."""

    def __init__(self, party: Party, attending: Callable[[], list[Attendance]], store: JobStore | None = None) -> None:
        """`attending`: the sites that are connected; `store`: keeps the jobs and their results."""
        self._store = store
        self._party = party
        self._attending = attending
        self._lock = threading.Lock()
        self._jobs: dict[str, ServerJob] = {}
        self._runners = ThreadPoolExecutor(MAX_RUNNING, thread_name_prefix="job")

    @property
    def lasting(self) -> bool:
        """Whether jobs outlive the server's process."""
        return self._store is not None

    def find(self, job_id: str | None) -> ServerJob | None:
        """The job of this id."""
        with self._lock:
            return None if job_id is None else self._jobs.get(job_id)

    def all(self) -> list[ServerJob]:
        """Every job, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def run(self, job: ServerJob, *, again: bool = False) -> None:
        """Queue a job; `again`: a server of before took it.

        Raises ApprovalRefused if its id was used before, or if too many wait.
        """
        with self._lock:
            if job.id in self._jobs:
                raise ApprovalRefused(job.id, ("a job of this id was submitted before",))
            self._forget_old()
            self._jobs[job.id] = job
        if self._store is not None and not again:
            try:
                self._store.put(job.id, job.stored())
            except SealwrightError:
                with self._lock:
                    del self._jobs[job.id]
                raise
        self._party.tell(f"job {job.id} is submitted by {job.signed.record.submitter}")
        self._runners.submit(self._run, job)

    def restore(self, job: ServerJob) -> None:
        """Remember a job that is over: a server of before ran it."""
        with self._lock:
            self._jobs[job.id] = job

    def delete(self, job: ServerJob) -> None:
        """Remember a job that is over no more, nor anything of it. Raises ApprovalRefused while it is not over."""
        with self._lock:
            if not job.status.over:
                raise ApprovalRefused(job.id, (f"the job is {job.status.value}: it is deleted when it is over",))
            self._jobs.pop(job.id, None)
        job.result = None
        if self._store is not None:
            self._store.forget(job.id)

    def tell_sites(self, job: ServerJob, command: str, *, member: str | None = None) -> None:
        """Show a user's signed command about a job to the connected sites of its roster, or of one member's."""
        charter = self._party.charter()
        for attendance in self._attending():
            place = charter.enrolment("site", attendance.name)
            concerned = member is None or (place is not None and place.member == member)
            if concerned and attendance.name in job.signed.record.roster:
                attendance.send(Told(job=job.id, command=command))

    def stop(self, why: str) -> None:
        """Stop all jobs; those that are kept go on with the next server."""
        for job in self.all():
            if self._store is None:
                job.abort(why)
            else:
                job.suspend(why)

    def close(self, why: str) -> None:
        """Stop all jobs and wait for their ends."""
        self.stop(why)
        self._runners.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: ServerJob) -> None:
        try:
            job.run(self._attending)
        except Exception as error:
            self._party.tell(f"job {job.id}: a fault of the server: {type(error).__name__}: {error}")
            raise
        finally:
            if job.status.over:
                self._keep_end(job)
                self._drop_old_results(newest=job)

    def _keep_end(self, job: ServerJob) -> None:
        if self._store is None:
            return
        try:
            job.result = self._store.end(job.id, job.ended()).result
            if self.find(job.id) is None:  # somebody was quick to delete it
                self._store.forget(job.id)
        except SealedDataRefused as error:
            self._party.tell(f"job {job.id}: its end is kept in memory alone: {error.what}")
            self._store.forget(job.id)

    def _drop_old_results(self, newest: ServerJob) -> None:
        kept = newest.result_size
        for job in reversed(self.all()):
            kept += 0 if job is newest else job.result_size
            if job is not newest and kept > KEPT_RESULTS:
                job.result = None
                if self._store is not None:
                    self._store.forget_result(job.id)

    def _forget_old(self) -> None:
        over = [job_id for job_id, job in self._jobs.items() if job.status.over]
        for job_id in over[: max(0, len(self._jobs) - MAX_JOBS + 1)]:
            del self._jobs[job_id]
            if self._store is not None:
                self._store.forget(job_id)
        if len(self._jobs) - len(over) >= MAX_OPEN:
            raise ApprovalRefused("(new)", (f"{MAX_OPEN} jobs wait or run already",))
