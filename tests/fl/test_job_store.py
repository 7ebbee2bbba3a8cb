"""What a server keeps of its jobs on a disk that its host can write to."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fl.errors import SealedDataRefused
from fl.jobs.progress import JobEvent, Status
from fl.jobs.sealing import SealedResult
from fl.jobs.statement import SignedStatement
from fl.server.job_store import EndedJob, JobStore, StoredJob
from fl.transport.memory import SealedMemory

KEY = bytes(range(32))
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVENTS = [JobEvent(kind="round", round=0), JobEvent(kind="status", text="finished")]
STATEMENT = SignedStatement(statement="a.b.c", sign_key="AAAA", ears=("d.e.f",))


def kept(folder: Path) -> tuple[JobStore, list[str]]:
    """A store with one finished job, `job-1`, and what it tells."""
    told: list[str] = []
    store = JobStore(folder, KEY, told.append)
    store.put("job-1", StoredJob("a record", b"a bundle", SealedMemory.of(b"a sealed model"), AT))
    result = SealedResult(SealedMemory.of(b"a sealed result"), {"acme-pharma/ada": b"a sealed key"})
    ended = store.end("job-1", EndedJob(Status.FINISHED, (), AT, AT, EVENTS, (result, STATEMENT, "a receipt")))
    assert ended.result is not None
    assert bytes(ended.result[0].payload.view) == b"a sealed result"
    return store, told


def file_of(folder: Path, kind: str) -> Path:
    return next(folder.glob(f"*.{kind}"))


def test_what_was_kept_is_there_for_the_next_server_and_for_nobody_else(tmp_path: Path) -> None:
    kept(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".job", ".model", ".end", ".result"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert b"a record" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    again = JobStore(tmp_path, KEY, print)
    (stored,) = again.all()
    assert (stored.record, stored.bundle, bytes(stored.sealed_model.view)) == (
        "a record",
        b"a bundle",
        b"a sealed model",
    )
    ended = again.ended("job-1")
    assert ended is not None
    assert (ended.status, ended.started, list(ended.events)) == (Status.FINISHED, AT, EVENTS)
    assert ended.result is not None
    assert ended.result[0].keys == {"acme-pharma/ada": b"a sealed key"}
    assert ended.result[1:] == (STATEMENT, "a receipt")
    told: list[str] = []
    assert list(JobStore(tmp_path, bytes(32), told.append).all()) == []
    assert "another key" in told[0]


@pytest.mark.parametrize("what", ["cut", "lengthened", "gone"])
def test_a_result_that_its_host_has_spoilt_is_none(tmp_path: Path, what: str) -> None:
    store, _ = kept(tmp_path)
    path = file_of(tmp_path, "result")
    if what == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (1 if what == "lengthened" else -1))
    ended = store.ended("job-1")
    assert ended is not None
    assert ended.status is Status.FINISHED
    assert ended.result is None


def test_an_end_that_its_host_has_changed_or_moved_is_refused(tmp_path: Path) -> None:
    store, told = kept(tmp_path)
    path = file_of(tmp_path, "end")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SealedDataRefused, match="changed"):
        store.ended("job-1")
    path.write_bytes(whole)
    store.put("job-2", StoredJob("another", b"b", SealedMemory.of(b"m"), AT))
    other = next(one for one in tmp_path.glob("*.job") if one.stem != path.stem)
    path.rename(other.with_suffix(".end"))
    with pytest.raises(SealedDataRefused, match="of another job"):
        store.ended("job-2")
    file_of(tmp_path, "job").write_bytes(b"noise")
    assert len(list(store.all())) == 1
    assert "cannot be opened" in told[0]


def test_what_is_forgotten_is_gone(tmp_path: Path) -> None:
    store, _ = kept(tmp_path)
    store.forget_result("job-1")
    assert {path.suffix for path in tmp_path.iterdir()} == {".job", ".end"}
    ended = store.ended("job-1")
    assert ended is not None
    assert ended.result is None
    assert store.sealed_model("job-1") is None
    assert len(list(store.all())) == 1
    store.forget("job-1")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    store, _ = kept(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    tmp_path.rmdir()  # the same as no room: nothing can be written there
    with pytest.raises(SealedDataRefused, match="cannot be kept"):
        store.put("job-2", StoredJob("r", b"b", SealedMemory.of(b"m"), AT))
