"""A started job: ask for its status, wait for its result, stop it. The same object for every environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fl.jobs.progress import JobEvent, Status, line_of, one_line


class JobHandle(Protocol):
    """What an environment keeps about a job that it started."""

    def status(self) -> Status:
        """The job's status now."""

    def result(self, timeout: float | None) -> Path:
        """The folder of the result, after waiting for it."""

    def abort(self) -> None:
        """Stop the job."""

    def watch(self, observe: Callable[[JobEvent], None]) -> Status:
        """Hand over what has happened and what happens, until the job is over."""

    def events(self) -> list[JobEvent]:
        """What has happened so far."""

    def logs(self) -> dict[str, str]:
        """What sites' scripts have printed, by site, where that may be seen."""


class Run:
    """A started job."""

    def __init__(self, job_id: str, handle: JobHandle) -> None:
        self.job_id = job_id
        self._handle = handle

    def get_job_id(self) -> str:
        """The job's id."""
        return self.job_id

    def get_status(self) -> str:
        """`queued`, `running`, `finished`, `failed` or `aborted`."""
        return self._handle.status().value

    def get_result(self, timeout: float | None = None) -> Path:
        """Wait (at most `timeout` seconds; None: until the job's own bounds end it) and return the result's folder.

        The folder is this user's alone and stays until it is removed: `model.safetensors` is the global model,
        `job.json` tells what happened, `events/` holds tracking if it was asked for. Raises JobFailed, JobAborted, or
        PeerLost when the time is up.
        """
        return self._handle.result(timeout)

    def abort(self) -> None:
        """Stop the job; nothing happens if it is over."""
        self._handle.abort()

    def logs(self, tail: int = 100, grep: str = "") -> list[str]:
        """The last `tail` lines of what happened so far that contain `grep`, as plain text, not as a pattern.

        In a simulation what each client printed follows, after its name; a real site's output never leaves it.
        """
        lines = [line for event in self._handle.events() if (line := line_of(event))]
        for site, text in sorted(self._handle.logs().items()):
            lines += [f"{site}: {one_line(line)}" for line in text.splitlines()]
        found = [line for line in lines if grep in line]
        return found[-tail:] if tail > 0 else []

    def metrics(self) -> list[dict[str, Any]]:
        """For each round so far `{"round", "mean", "sites"}`: the weighted mean of each metric, and each site's own."""
        rounds: dict[int, dict[str, Any]] = {}
        for event in self._handle.events():
            if event.round is None or event.kind not in {"update", "aggregated"}:
                continue
            row = rounds.setdefault(event.round, {"round": event.round, "mean": {}, "sites": {}})
            if event.kind == "aggregated":
                row["mean"] = dict(event.values)
            elif event.site is not None:
                row["sites"][event.site] = dict(event.values)
        return [rounds[number] for number in sorted(rounds)]

    def watch(self, observe: Callable[[JobEvent], None]) -> str:
        """Call `observe` with each event from the job's beginning; the status when it is over."""
        return self._handle.watch(observe).value
