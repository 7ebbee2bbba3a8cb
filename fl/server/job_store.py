"""What a server keeps of its jobs that are not over, so that it goes on with them after it was killed.

    <digest of the job's id>.job     the record, the bundle, the first model as it came, when it came
    <digest of the job's id>.round   the next round, its model, what the algorithm remembers, what happened so far

Each is one sealed file (`fl.guard.sealed_data`), replaced whole or not at all, under a key that is derived from the key
of first models: brokers release that to this server alone, so that the folder may lie where a host sees it. A host that
puts an older file back makes sites refuse: each gives each round once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl.errors import SealedDataRefused
from fl.guard.sealed_data import open_file, seal_file
from fl.jobs.record import JobId
from fl.jobs.results import JobHistory
from fl.model import params_of, tensors_of
from fl.server.federation import Federation, Saved
from fl.tensors import Buffer, encode, parse
from fl.transport.memory import SealedMemory
from policies.errors import SealwrightError

_PURPOSE: Final = b"sealwright-job-store-v1"


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it was submitted."""

    record: str
    bundle: bytes
    sealed_model: Buffer
    received: datetime


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    job: JobId
    round: Annotated[int, Field(ge=1)]
    started: str
    judged: dict[str, float]
    rounds: list[dict[str, Any]]
    best: dict[str, Any]


class JobStore:
    """The jobs of one server, in a folder. Safe to use from several threads, one at a time for each job."""

    def __init__(self, folder: Path, model_key: bytes, tell: Callable[[str], None]) -> None:
        """The folder is made if it is not there, for this user alone."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._key = HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE).derive(model_key)
        self._tell = tell

    def put(self, job: str, stored: StoredJob) -> None:
        """Keep a job that was taken. Raises SealedDataRefused if that cannot be."""
        entries = {
            "record": stored.record.encode(),
            "bundle": stored.bundle,
            "model": stored.sealed_model,
            "received": stored.received.isoformat().encode(),
        }
        self._write(self._path(job, "job"), entries)

    def forget(self, job: str) -> None:
        """The job is over."""
        for kind in ("round", "job"):
            self._path(job, kind).unlink(missing_ok=True)

    def all(self) -> Iterator[StoredJob]:
        """Every job that is not over, the oldest first. What cannot be opened is told of and left where it is."""
        found = []
        for path in sorted(self._folder.glob("*.job")):
            try:
                entries = open_file(path, self._key)
                received = datetime.fromisoformat(entries["received"].decode())
                found.append(StoredJob(entries["record"].decode(), entries["bundle"], entries["model"], received))
            except (SealedDataRefused, KeyError, ValueError) as error:
                self._tell(f"a stored job cannot be opened, {path.name}: {error}")
        yield from sorted(found, key=lambda stored: stored.received)

    def keeper(self, job: str, history: JobHistory, federation: Callable[[], Federation]) -> JobKeeper:
        """What keeps one job's state from round to round; its `federation` has the best model."""
        return JobKeeper(self, job, history, federation)

    def read_round(self, job: str) -> dict[str, bytes] | None:
        """The entries of a job's last whole round; None if there was none. Raises SealedDataRefused."""
        path = self._path(job, "round")
        return open_file(path, self._key) if path.exists() else None

    def write_round(self, job: str, entries: Mapping[str, Buffer]) -> None:
        """Keep a job's last whole round. Raises SealedDataRefused if that cannot be."""
        self._write(self._path(job, "round"), entries)

    def _path(self, job: str, kind: str) -> Path:
        return self._folder / f"{sha256(job.encode()).hexdigest()[:32]}.{kind}"

    def _write(self, path: Path, entries: Mapping[str, Buffer]) -> None:
        try:
            seal_file(path, entries, self._key, random=os.urandom)
        except OSError as error:
            raise SealedDataRefused(f"a job cannot be kept: {error.strerror}", where=str(self._folder)) from error


class JobKeeper:
    """Keeps one job's state (`fl.server.federation.Keeper`)."""

    def __init__(self, store: JobStore, job: str, history: JobHistory, federation: Callable[[], Federation]) -> None:
        self._store = store
        self._job = job
        self._history = history
        self._federation = federation

    def saved(self) -> Saved | None:
        """Where the job stood; its history is told. Raises SealedDataRefused for a round that does not fit the job."""
        entries = self._store.read_round(self._job)
        if entries is None:
            return None
        try:
            index = _Index.model_validate(json.loads(entries["index"]))
            started = datetime.fromisoformat(index.started)
            state = params_of(parse(entries["state"], max_size=len(entries["state"])), "numpy")
            model = SealedMemory.of(entries["model"])
            if index.job != self._job:
                raise ValueError("it is of another job")
        except (KeyError, ValueError, ValidationError, RecursionError, SealwrightError) as error:
            raise SealedDataRefused(f"the stored round cannot be used: {error}", where=self._job) from error
        self._history.rounds[:] = index.rounds
        self._history.best = dict(index.best)
        self._history.started = started
        if "best" in entries:
            self._federation().best = SealedMemory.of(entries["best"])
        return Saved(index.round, model, state, index.judged)

    def save(self, saved: Saved) -> None:
        """Keep where the job stands."""
        index = _Index(
            job=self._job,
            round=saved.round,
            started=self._history.started.isoformat(),
            judged=dict(saved.judged),
            rounds=self._history.rounds,
            best=self._history.best,
        )
        entries: dict[str, Buffer] = {
            "index": index.model_dump_json().encode(),
            "model": saved.model.view,
            "state": encode(tensors_of(saved.state)),
        }
        if (best := self._federation().best) is not None:
            entries["best"] = best.view
        self._store.write_round(self._job, entries)
