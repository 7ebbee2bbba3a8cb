"""What a server keeps of its jobs, so that it goes on with them after it was killed, and has their results still.

    <digest of the job's id>.job     the record, the bundle, when it came
    <digest of the job's id>.model   the first model as it came: sealed for this job
    <digest of the job's id>.<digest of a large file>.file   the file as it came, sealed in the same way
    <digest of the job's id>.round   the next round, its model, what the algorithm remembers, what happened so far
    <digest of the job's id>.end     what became of it, instead of a round: its events, statement, recipients' keys
    <digest of the job's id>.result  the result as it goes out: sealed to its recipients

Model and result are sealed already; the others are sealed files (`fl.guard.sealed_data`) under a key that is derived
from the key of first models: brokers release that to this server alone, so that the folder may lie where a host sees
it. Each is replaced whole or not at all. A host that puts an older round back makes sites refuse: each gives each round
once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attestation.canonical import b64, unb64
from fl.errors import SealedDataRefused
from fl.guard.sealed_data import entries_of, open_file, opened, seal_file, stream_of
from fl.jobs.progress import JobEvent, Status
from fl.jobs.record import JobId
from fl.jobs.results import JobHistory
from fl.jobs.sealing import SealedResult
from fl.jobs.statement import SignedStatement
from fl.model import params_of, tensors_of
from fl.server.federation import Federation, Saved
from fl.tensors import Buffer, encode
from fl.transport.drafts import written
from fl.transport.memory import SealedMemory
from fl.transport.spool import PIECE, Spool
from fl.transport.stored import Stored
from policies.errors import SealwrightError

_PURPOSE: Final = b"sealwright-job-store-v1"


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it was submitted."""

    record: str
    bundle: bytes
    sealed_model: Stored
    received: datetime
    sealed_files: Mapping[str, Stored] = field(default_factory=dict)
    """Its large files as they came, by digest."""


@dataclass(frozen=True, slots=True)
class EndedJob:
    """What became of a job; `result` is None if there is none, or none any more."""

    status: Status
    reasons: tuple[str, ...]
    started: datetime
    finished: datetime
    events: Sequence[JobEvent]
    result: tuple[SealedResult, SignedStatement, str] | None


class _End(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = 1
    job: JobId
    status: Status
    reasons: Annotated[tuple[str, ...], Field(strict=False)]
    started: str
    finished: str
    size: Annotated[int, Field(ge=0)]
    keys: dict[str, str]
    statement: SignedStatement | None
    receipt: str


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
        self.spool = Spool(folder)
        """For what is too large for memory, beside the jobs."""
        self._tell = tell

    def put(self, job: str, stored: StoredJob) -> None:
        """Keep a job that was taken. Raises SealedDataRefused if that cannot be."""
        entries = {
            "record": stored.record.encode(),
            "bundle": stored.bundle,
            "received": stored.received.isoformat().encode(),
        }
        self._write_raw(self._path(job, "model"), stored.sealed_model)
        for digest, sealed in stored.sealed_files.items():
            self._write_raw(self._path(job, f"{digest}.file"), sealed)
        self._write(self._path(job, "job"), entries)

    def forget(self, job: str) -> None:
        """Nothing of the job is wanted any more."""
        for kind in ("job", "round", "end", "result", "model"):  # without its first there is no job
            self._path(job, kind).unlink(missing_ok=True)
        self._forget_files(job)

    def forget_result(self, job: str) -> None:
        """Of a job that is over, what is large is wanted no more."""
        for kind in ("result", "model"):
            self._path(job, kind).unlink(missing_ok=True)
        self._forget_files(job)

    def _forget_files(self, job: str) -> None:
        for path in self._folder.glob(self._path(job, "*.file").name):
            path.unlink(missing_ok=True)

    def all(self) -> Iterator[StoredJob]:
        """Every job, the oldest first. What cannot be opened is told of and left where it is."""
        found = []
        for path in sorted(self._folder.glob("*.job")):
            try:
                entries = open_file(path, self._key)
                received = datetime.fromisoformat(entries["received"].decode())
                model = _mapped(path.with_suffix(".model")) or SealedMemory.of(b"-")  # it was wanted no more
                record, files = entries["record"].decode(), self._files(path.stem)
                found.append(StoredJob(record, entries["bundle"], model, received, files))
            except (SealedDataRefused, OSError, KeyError, ValueError) as error:
                self._tell(f"a stored job cannot be opened, {path.name}: {error}")
        yield from sorted(found, key=lambda stored: stored.received)

    def sealed_model(self, job: str) -> SealedMemory | None:
        """A job's first model as it came, if it is kept still. The caller's to close."""
        return _mapped(self._path(job, "model"))

    def sealed_files(self, job: str) -> dict[str, Stored]:
        """A job's large files as they came, by digest, as far as they are kept still. The caller's to close."""
        return self._files(self._path(job, "job").stem)

    def _files(self, stem: str) -> dict[str, Stored]:
        found = {path.name.split(".")[1]: _mapped(path) for path in sorted(self._folder.glob(f"{stem}.*.file"))}
        return {digest: file for digest, file in found.items() if file is not None}

    def end(self, job: str, ended: EndedJob) -> EndedJob:
        """Keep what became of a job; the same, its result where it is kept. Raises SealedDataRefused."""
        sealed, statement, receipt = ended.result or (None, None, "")
        if sealed is not None:
            self._write_raw(self._path(job, "result"), sealed.payload)
        index = _End(
            job=job,
            status=ended.status,
            reasons=ended.reasons,
            started=ended.started.isoformat(),
            finished=ended.finished.isoformat(),
            size=0 if sealed is None else sealed.payload.size,
            keys={} if sealed is None else {name: b64(key) for name, key in sealed.keys.items()},
            statement=statement,
            receipt=receipt,
        )
        lines = b"\n".join(event.model_dump_json().encode() for event in ended.events)
        self._write(self._path(job, "end"), {"index": index.model_dump_json().encode(), "events": lines})
        self._path(job, "round").unlink(missing_ok=True)
        return self.ended(job) or ended

    def ended(self, job: str) -> EndedJob | None:
        """What became of a job; None if it is not over. Raises SealedDataRefused."""
        path = self._path(job, "end")
        if not path.exists():
            return None
        entries = open_file(path, self._key)
        try:
            index = _End.model_validate_json(entries["index"])
            events = [JobEvent.model_validate_json(line) for line in entries["events"].splitlines()]
            keys = {name: unb64(key, where=job) for name, key in index.keys.items()}
            if index.job != job or not index.status.over:
                raise ValueError("it is of another job")
            payload = _mapped(path.with_suffix(".result")) if index.statement is not None else None
            result = None
            if payload is not None and index.statement is not None and payload.size == index.size:
                result = SealedResult(payload, keys), index.statement, index.receipt
            started, finished = (datetime.fromisoformat(text) for text in (index.started, index.finished))
        except (OSError, KeyError, ValueError, SealwrightError) as error:
            raise SealedDataRefused(f"what became of a job cannot be read: {error}", where=job) from error
        return EndedJob(index.status, index.reasons, started, finished, events, result)

    def keeper(self, job: str, history: JobHistory, federation: Callable[[], Federation]) -> JobKeeper:
        """What keeps one job's state from round to round; its `federation` has the best model."""
        return JobKeeper(self, job, history, federation)

    def read_round(self, job: str) -> dict[str, Stored] | None:
        """The entries of a job's last whole round; None if there was none. Raises SealedDataRefused, SpoolFailed."""
        path = self._path(job, "round")
        if not path.exists():
            return None
        with stream_of(path) as (file, size, sector):
            total, chunks = opened(file, self._key, where=path.name, file_size=size, sector=sector)
            parts = entries_of(total, chunks, where=path.name)
            return {name: written(length, pieces, self.spool) for name, length, pieces in parts}

    def write_round(self, job: str, entries: Mapping[str, Buffer | Stored]) -> None:
        """Keep a job's last whole round. Raises SealedDataRefused if that cannot be."""
        self._write(self._path(job, "round"), entries)

    def _path(self, job: str, kind: str) -> Path:
        return self._folder / f"{sha256(job.encode()).hexdigest()[:32]}.{kind}"

    def _write_raw(self, path: Path, data: Stored) -> None:
        """Write what is sealed already."""
        draft = path.with_name(f".{path.name}.draft")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.writelines(data.pieces(0, PIECE))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise SealedDataRefused(f"a job cannot be kept: {error.strerror}", where=str(self._folder)) from error

    def _write(self, path: Path, entries: Mapping[str, Buffer | Stored]) -> None:
        try:
            seal_file(path, entries, self._key, random=os.urandom)
        except OSError as error:
            raise SealedDataRefused(f"a job cannot be kept: {error.strerror}", where=str(self._folder)) from error


def _mapped(path: Path) -> SealedMemory | None:
    """A file, mapped; None if it is not there. Raises OSError, ValueError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return SealedMemory(descriptor, os.fstat(descriptor).st_size)
    except BaseException:
        os.close(descriptor)
        raise


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
            index = _Index.model_validate(json.loads(bytes(entries["index"].view)))
            started = datetime.fromisoformat(index.started)
            state = params_of(entries["state"].tensors(), "numpy")
            model = entries["model"]
            if index.job != self._job:
                raise ValueError("it is of another job")
        except (KeyError, ValueError, ValidationError, RecursionError, SealwrightError) as error:
            raise SealedDataRefused(f"the stored round cannot be used: {error}", where=self._job) from error
        self._history.rounds[:] = index.rounds
        self._history.best = dict(index.best)
        self._history.started = started
        if "best" in entries:
            self._federation().best = entries["best"]
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
        entries: dict[str, Buffer | Stored] = {
            "index": index.model_dump_json().encode(),
            "model": saved.model,
            "state": encode(tensors_of(saved.state)),
        }
        if (best := self._federation().best) is not None:
            entries["best"] = best
        self._store.write_round(self._job, entries)
