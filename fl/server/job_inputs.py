"""What came with a job beside its bundle, sealed for this job alone: its first model and its large files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fl.errors import ApprovalRefused
from fl.guard.gate import admit_update
from fl.jobs.sealing import open_file_of_job, open_first_model

if TYPE_CHECKING:
    from fl.jobs.record import JobRecord
    from fl.jobs.settings import JobSettings
    from fl.transport.spool import Spool
    from fl.transport.stored import Stored


class JobInputs:
    """They are opened once, by the thread that runs the job; files that are open can be asked for from any thread."""

    def __init__(
        self, model: Stored, files: Mapping[str, Stored], model_key: bytes, record: JobRecord, spool: Spool | None
    ) -> None:
        """`files`: by the digest of what is sealed in them."""
        self.sealed_model = model
        self.sealed_files = dict(files)
        self._model_key = model_key
        self._record = record
        self._spool = spool
        self._files: dict[str, Stored] = {}

    def first_model(self, settings: JobSettings) -> Stored:
        """The first model, opened, if it is what the record says and what the bundle declares."""
        record = self._record
        with self.sealed_model as sealed:
            memory = open_first_model(
                sealed, self._model_key, record.job, max_bytes=record.model_size, spool=self._spool
            )
        if memory.size != record.model_size or memory.digest != record.model_sha256:
            raise ApprovalRefused(record.job, ("the first model is not the one that the record names",))
        admit_update(memory.source, settings.schema_of_model, site=record.submitter)
        return memory

    def open_files(self, settings: JobSettings) -> None:
        """Open the job's large files, from which on sites may pull them. Raises SealedDataRefused, SpoolFailed."""
        job = self._record.job
        for file in settings.files:
            if file.sha256 in self._files:
                continue
            sealed = self.sealed_files.pop(file.sha256, None)
            if sealed is None:
                raise ApprovalRefused(job, (f"the file {file.path} is not kept any more",))
            with sealed:
                self._files[file.sha256] = open_file_of_job(
                    sealed, file.sha256, file.size, self._model_key, job, spool=self._spool
                )

    def file(self, sha256: str) -> Stored | None:
        """A large file of the bundle, while the job runs."""
        return self._files.get(sha256)

    def close(self) -> None:
        """Give back what is left."""
        self.sealed_model.close()
        for held in (self.sealed_files, self._files):
            while held:
                held.popitem()[1].close()
