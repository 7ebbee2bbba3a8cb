"""A job's record and result: one layout, whatever ran it.

job.json            what was asked for and what happened, round by round
model.safetensors   the last global model
best_model.safetensors   the best one, if the recipe selects by a metric
events/             tracking (TensorBoard event files), if the recipe asked for it
<site>/log.txt      a site's own output (simulation only: a real site's output stays at the site)
statement.jws, receipt.json   who vouches for it (attested jobs only)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fl.jobs.progress import JobEvent, Status
from fl.jobs.settings import JobSettings

MODEL_FILE: Final = "model.safetensors"
BEST_FILE: Final = "best_model.safetensors"
JOB_FILE: Final = "job.json"
MAX_HISTORY: Final = 100_000


class JobHistory:
    """Gathers a job's events into its record."""

    def __init__(self, job_id: str, settings: JobSettings, started: datetime) -> None:
        self.job_id = job_id
        self.settings = settings
        self.started = started
        self.status = Status.RUNNING
        self.reasons: tuple[str, ...] = ()
        self.finished: datetime | None = None
        self.model: str | None = None
        self.rounds: list[dict[str, Any]] = []
        self.values: list[dict[str, Any]] = []
        self.sites: dict[str, str] = {}
        self.best: dict[str, Any] = {}
        self.evaluations: dict[str, dict[str, Mapping[str, float]]] = {}

    def observe(self, event: JobEvent) -> None:
        """Take one event into account."""
        if event.kind in {"joined", "resumed"} and event.site:
            self.sites[event.site] = "in the job"
        elif event.kind == "paused" and event.site:
            self.sites[event.site] = f"paused: {event.text}"
        elif event.kind in {"lost", "refused"} and event.site:
            self.sites[event.site] = f"{event.kind}: {event.text}"
        elif event.kind == "round":
            self.rounds.append({"round": event.round, "updates": {}, "metrics": {}})
        elif event.kind == "update" and event.site and self.rounds:
            self.rounds[-1]["updates"][event.site] = {"weight": event.weight, "metrics": event.values}
        elif event.kind == "aggregated" and self.rounds:
            self.rounds[-1]["metrics"] = event.values
        elif event.kind == "best":
            self.best = {"round": event.round, **event.values}
        elif event.kind == "evaluated" and event.site:
            self.evaluations.setdefault(event.site, {})[event.text] = event.values
        elif event.kind == "value" and len(self.values) < MAX_HISTORY:
            self.values.append({"site": event.site, "step": event.round, **event.values})

    @property
    def contributors(self) -> tuple[str, ...]:
        """Who sent updates in the last round that has any: a job may end in the middle of one."""
        return next((tuple(one["updates"]) for one in reversed(self.rounds) if one["updates"]), ())

    def end(self, status: Status, at: datetime, *, reasons: tuple[str, ...] = (), model: str | None = None) -> None:
        """The job is over."""
        self.status, self.finished, self.reasons, self.model = status, at, reasons, model

    def document(self, **changes: Any) -> Mapping[str, Any]:
        """The record as JSON, without what is empty; `changes` stand in for what is not so yet."""
        document = {
            "job": self.job_id,
            "name": self.settings.name,
            "recipe": self.settings.recipe,
            "status": self.status.value,
            "reasons": list(self.reasons),
            "started": rfc3339(self.started),
            "finished": None if self.finished is None else rfc3339(self.finished),
            "num_rounds": self.settings.num_rounds,
            "min_clients": self.settings.min_clients,
            "sites": self.sites,
            "tracking": self.settings.tracking,
            "rounds": self.rounds,
            "best": self.best,
            "cross_site_evaluation": self.evaluations,
            "values": self.values,
            "model_sha256": self.model,
            **changes,
        }
        return {key: value for key, value in document.items() if value not in (None, [], {})}


def rfc3339(at: datetime) -> str:
    """UTC with Z, whole seconds."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file of this user's alone, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file as `write_file` does."""
    write_file(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
