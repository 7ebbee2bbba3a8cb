"""What a device remembers over its end, so that it goes on where it was killed: one state, the task, the result.

A file is replaced whole or not at all. What is half there or of another version counts as nothing: the device begins
anew, and whatever it sends again counts once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fl.edge.messages import Blob, JobId, Task, Word, Words
from fl.edge.protocol import State
from policies.errors import Unusable

STATE: Final = "state.json"
RESULT: Final = "result"
MAX_STATE: Final = 1 << 20
KEPT_BLOBS: Final = 4
"""Sealed models and graphs that are kept, the newest."""


class Standing(Words):
    """Where a device is (fl.edge.protocol): `job` and `name` but in idle and over, `task` in training and reporting."""

    state: State = "idle"
    job: JobId | None = None
    name: Word | None = None
    task: Task | None = None
    weight: float = 1.0


class Memory:
    """A device's folder, private to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder

    def standing(self) -> Standing:
        """What was kept last; where a device begins if that is nothing, or cannot be gone on with."""
        raw = self._read(STATE, MAX_STATE)
        try:
            found = Standing() if raw is None else Standing.model_validate_json(raw)
        except ValidationError:
            return Standing()
        if found.state == "masking":  # its keys went with the process: the cohort goes on without it
            return found.model_copy(update={"state": "joined", "task": None})
        needs_task = found.state in ("training", "reporting")
        if (found.state not in ("idle", "over") and found.job is None) or (needs_task and found.task is None):
            return Standing()
        if found.state == "reporting" and self.result() is None:
            return Standing()
        return found

    def keep(self, standing: Standing) -> None:
        """Keep where the device is. Raises Unusable if it cannot be kept."""
        self._write(STATE, standing.model_dump_json().encode())
        if standing.state not in ("reporting", "masking"):
            (self._folder / RESULT).unlink(missing_ok=True)

    def result(self) -> bytes | None:
        """The result that no gateway has acknowledged."""
        return self._read(RESULT, 1 << 40)

    def keep_result(self, content: bytes) -> None:
        """Keep a result; then keep that the device is `reporting`."""
        self._write(RESULT, content)

    def blob(self, blob: Blob) -> bytes:
        """What is here of a sealed blob."""
        return self._read(blob.id, blob.size + 16) or b""

    def keep_blob(self, blob: Blob, content: bytes) -> None:
        """Keep what has come of a sealed blob, and drop the oldest of the others."""
        self._write(blob.id, content)
        others = sorted(
            (path for path in self._folder.iterdir() if len(path.name) == 64 and path.name != blob.id),
            key=lambda path: path.stat().st_mtime,
        )
        for path in others[: max(0, len(others) - KEPT_BLOBS + 1)]:
            path.unlink(missing_ok=True)

    def forget_blob(self, blob: Blob) -> None:
        """Drop a blob that is not what it should be."""
        (self._folder / blob.id).unlink(missing_ok=True)

    def _read(self, name: str, limit: int) -> bytes | None:
        path = self._folder / name
        try:
            if path.stat().st_size > limit:
                return None
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error

    def _write(self, name: str, content: bytes) -> None:
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=".new.")
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self._folder / name)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> Unusable:
        return Unusable(
            f"the device's folder cannot be used: {error.strerror}",
            where=str(self._folder),
            do="Give the device a folder of its own with some room.",
        )
