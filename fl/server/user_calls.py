"""What users tell the server about jobs; about the server and its sites it is `fl.server.administration`.

Every call is judged by its caller's certificate, which TLS has proved, by the signed command that it brings, and by the
rights that the charter gives at that moment. What is done is in the ledger before it is done; what is refused is too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final

from attestation.canonical import b64
from attestation.identity import appraise_user
from fl.errors import ApprovalRefused, CommandRefused, MalformedMessage, PeerLost
from fl.guard.approval import SignedRecord, approve, read_record
from fl.guard.command import Nonces, SignedCommand, check_command, read_command
from fl.guard.command_log import CommandLog
from fl.jobs.bundle import MAX_BUNDLE, Bundle, parse_bundle
from fl.jobs.progress import Status
from fl.jobs.record import JobRecord, record_digest
from fl.jobs.sealing import (
    open_file_of_job,
    open_first_model,
    seal_file_of_job,
    seal_first_model,
    sealed_file_size,
)
from fl.party import Party
from fl.server.administration import Administration, Steering
from fl.server.calls import Call, Caller, first_frame, only_frame, unstalled
from fl.server.job import ServerJob
from fl.server.job_store import JobStore
from fl.server.jobs import Jobs
from fl.transport.chunks import assemble, serve_chunks
from fl.transport.frames import Happened, Order, Origin, Pull, Reports, Result, Submit, Verdict, pack
from fl.transport.memory import SealedMemory
from fl.transport.spool import memory_part
from fl.transport.stored import Stored
from policies.errors import SealwrightError
from policies.rights import command_reasons

if TYPE_CHECKING:
    from fl.server.attendance import Attendance
    from policies.documents import Role
    from policies.rights import Command

LISTED_JOBS: Final = 100
LISTED_SITES: Final = 1000
SEALING_OVERHEAD: Final = 1 << 20


class UserCalls:
    """The users' half of one server's service."""

    def __init__(
        self,
        party: Party,
        server: str,
        model_key: bytes,
        jobs: Jobs,
        attending: Callable[[], list[Attendance]],
        steer: Callable[[Steering], None],
        store: JobStore | None = None,
    ) -> None:
        """`attending`: the connected sites; `steer` restarts or stops the server; `store`: keeps the jobs."""
        self._store = store
        self._party = party
        self._server = server
        self._model_key = model_key
        self._jobs = jobs
        self._attending = attending
        self._administration = Administration(party, server, jobs, attending, self._order, steer)
        self._log = CommandLog(party.record, party.tell, {"server": server})
        self._lock = threading.Lock()
        self._nonces = Nonces()

    @property
    def streamed(self) -> dict[str, Call]:
        """Calls with a stream of frames, by method."""
        return {"Submit": self._submit}

    @property
    def asked(self) -> dict[str, Call]:
        """Calls with one frame, by method."""
        return {
            "Jobs": self._reports,
            "Report": self._report,
            "Watch": self._watch,
            "Download": self._download,
            "Abort": self._abort,
            "Delete": self._delete,
            "Origin": self._origin,
            "Decide": self._decide,
            **self._administration.asked,
        }

    # --- submit -----------------------------------------------------------------------------------------------------

    def _submit(self, requests: Iterator[bytes], caller: Caller) -> Iterator[bytes]:
        user, about = self._user_of(caller, "submit"), _About()
        try:
            yield from self._receive_job(user, unstalled(requests, caller), about)
        except SealwrightError as error:
            self._log.refused(user, "submit", about.job, error, about.token)
            raise

    def _receive_job(self, user: str, requests: Iterator[bytes], about: _About) -> Iterator[bytes]:
        charter = self._party.charter()
        lacking = command_reasons(charter, user, "submit")
        if lacking:
            raise CommandRefused("submit", user, lacking)
        head = first_frame(requests, Submit)
        signed = read_record(head.record, charter)
        record = signed.record
        about.job, about.token = record.job, record_digest(head.record)
        if record.submitter != user:
            raise ApprovalRefused(record.job, (f"{user} brings a record of {record.submitter}",))
        if self._jobs.find(record.job) is not None:
            raise ApprovalRefused(record.job, ("a job of this id was submitted before",))
        if head.like is not None:
            bundle, sealed, files = self._like(head, record)
            approve(signed, bundle, charter, self._party.clock(), server=self._server, site=None)
        else:
            bundle, sealed, files = yield from self._transferred(head, signed, requests)
        job = self._job(signed, bundle, sealed, files)
        self._log.accepted(user, "submit", record.job, about.token)
        self._jobs.run(job)
        yield pack(Verdict(accepted=True))

    def _transferred(
        self, head: Submit, signed: SignedRecord, requests: Iterator[bytes]
    ) -> Generator[bytes, None, tuple[Bundle, Stored, dict[str, Stored]]]:
        """The bundle, the sealed first model and files, as they follow. Raises ApprovalRefused, MalformedMessage."""
        record = signed.record
        largest = record.model_size + SEALING_OVERHEAD + (record.model_size >> 8)
        if not 0 < head.bundle_size <= MAX_BUNDLE or not 0 < head.model_size <= largest:
            raise MalformedMessage("the bundle or the first model is larger than it may be", where="submission")
        yield pack(Pull(offset=0))
        with assemble(requests, size=head.bundle_size, sha256=None, where="bundle") as memory:
            bundle = parse_bundle(bytes(memory.view))
        approve(signed, bundle, self._party.charter(), self._party.clock(), server=self._server, site=None)
        spool = None if self._store is None else self._store.spool
        sizes = {file.sha256: sealed_file_size(file.sha256, file.size) for file in bundle.settings.files}
        if spool is None and (total := sum(sizes.values())) > memory_part():
            why = (
                f"its files have {total} bytes, and this server has no vault: {memory_part()} bytes fit into its memory"
            )
            raise ApprovalRefused(record.job, (why,))
        model = assemble(requests, size=head.model_size, sha256=None, where="first model", spool=spool)
        files: dict[str, Stored] = {}
        try:
            for digest, size in sizes.items():
                files[digest] = assemble(requests, size=size, sha256=None, where=f"file {digest}", spool=spool)
        except BaseException:
            for part in (model, *files.values()):
                part.close()
            raise
        return bundle, model, files

    def _like(self, head: Submit, record: JobRecord) -> tuple[Bundle, Stored, dict[str, Stored]]:
        """Bundle, first model and files of an earlier job of the same submitter. Raises ApprovalRefused, PeerLost.

        The model is the submitter's: whoever else ran it for one round would have it.
        """
        job = self._jobs.find(head.like)
        if job is None:
            raise PeerLost(f"there is no job {head.like}", where="job")
        earlier = job.signed.record
        if earlier.submitter != record.submitter:
            raise ApprovalRefused(record.job, (f"{record.submitter} did not submit the job {job.id}",))
        same = (earlier.bundle, earlier.model_sha256, earlier.model_size)
        if same != (record.bundle, record.model_sha256, record.model_size) or head.bundle_size or head.model_size:
            raise ApprovalRefused(record.job, (f"its bundle and first model are not those of the job {job.id}",))
        if self._store is None:
            why = "this server has no vault and keeps no first models: submit the job itself again"
            raise PeerLost(why, where="job")
        kept = self._store.sealed_model(job.id)
        if kept is None:
            raise PeerLost(f"the first model of job {job.id} is not kept: submit the job itself again", where="job")
        with kept, open_first_model(kept.view, self._model_key, job.id, max_bytes=record.model_size) as model:
            sealed = seal_first_model(model.view, self._model_key, record.job, random=os.urandom)
        files: dict[str, Stored] = {}
        for digest, part in self._store.sealed_files(job.id).items():
            size = next(file.size for file in job.bundle.settings.files if file.sha256 == digest)
            with part, open_file_of_job(part, digest, size, self._model_key, job.id, spool=self._store.spool) as file:
                files[digest] = seal_file_of_job(file, digest, self._model_key, record.job, random=os.urandom)
        return job.bundle, SealedMemory.of(sealed), files

    def _job(
        self,
        signed: SignedRecord,
        bundle: Bundle,
        sealed_model: Stored,
        sealed_files: Mapping[str, Stored],
        received: datetime | None = None,
    ) -> ServerJob:
        return ServerJob(
            self._party,
            self._server,
            signed,
            bundle,
            sealed_model=sealed_model,
            sealed_files=sealed_files,
            model_key=self._model_key,
            store=self._store,
            received=received,
        )

    def go_on(self) -> None:
        """Run the stored jobs that a server of before took, and remember those that are over.

        What may not run any more ends with its reasons.
        """
        for stored in () if self._store is None else self._store.all():
            try:
                signed = read_record(stored.record, self._party.charter())
                bundle = parse_bundle(stored.bundle)
                job = self._job(signed, bundle, stored.sealed_model, stored.sealed_files, stored.received)
                if (ended := None if self._store is None else self._store.ended(job.id)) is None:
                    self._jobs.run(job, again=True)
                else:
                    job.restore(ended)
                    self._jobs.restore(job)
            except SealwrightError as error:
                self._party.tell(f"a stored job cannot go on: {error.what}")

    # --- look on ----------------------------------------------------------------------------------------------------

    def _reports(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        self._ordered(request, caller, "list")
        newest = self._jobs.all()[-LISTED_JOBS:]
        told = tuple(job.journal.report(details=False) for job in newest)
        yield pack(Reports(jobs=told, sites=tuple(one.name for one in self._attending()[:LISTED_SITES])))

    def _report(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, _ = self._about_job(request, caller, "report")
        yield pack(job.journal.report())

    def _watch(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, _ = self._about_job(request, caller, "watch")
        caller.when_over(job.journal.wake)
        for event in job.journal.watch(alive=caller.active):
            yield pack(Happened(event=event))

    # --- take and change --------------------------------------------------------------------------------------------

    def _download(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, signed = self._about_job(request, caller, "download", check=_has_result_for)
        if job.result is None:
            raise PeerLost(f"the result of job {job.id} is not kept any more", where="job")
        sealed, statement, receipt = job.result
        head = Result(
            record=job.signed.token,
            statement=statement,
            sealed_key=b64(sealed.keys[signed.command.user]),
            size=sealed.payload.size,
            receipt=receipt,
        )
        yield pack(head)
        yield from serve_chunks(sealed.payload)

    def _abort(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, signed = self._about_job(request, caller, "abort")
        self._jobs.tell_sites(job, signed.token)
        job.abort(signed.command.user)
        yield pack(Verdict(accepted=True))

    def _delete(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, _ = self._about_job(request, caller, "delete", check=_is_over)
        self._jobs.delete(job)
        yield pack(Verdict(accepted=True))

    def _origin(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, _ = self._about_job(request, caller, "clone")
        yield pack(Origin(record=job.signed.token))

    def _decide(self, request: bytes, caller: Caller) -> Iterator[bytes]:
        job, signed = self._about_job(request, caller, "approve", "reject", check=_may_be_decided)
        job.decide(signed)
        self._jobs.tell_sites(job, signed.token, member=signed.user.member)
        yield pack(Verdict(accepted=True))

    # --- every command ----------------------------------------------------------------------------------------------

    def _about_job(
        self,
        request: bytes,
        caller: Caller,
        *verbs: Command,
        check: Callable[[ServerJob, SignedCommand], None] = lambda job, signed: None,
    ) -> tuple[ServerJob, SignedCommand]:
        """The job that an order is about, and the order. Raises what `check` raises; PeerLost if there is no job."""
        job, signed = self._ordered(request, caller, *verbs, check=check)
        if job is None:
            raise MalformedMessage("the command is about no job", where="command")
        return job, signed

    def _order(self, request: bytes, caller: Caller, *verbs: Command) -> SignedCommand:
        return self._ordered(request, caller, *verbs)[1]

    def _ordered(
        self,
        request: bytes,
        caller: Caller,
        *verbs: Command,
        check: Callable[[ServerJob, SignedCommand], None] = lambda job, signed: None,
    ) -> tuple[ServerJob | None, SignedCommand]:
        """Judge the order of a call, and write down what came of it."""
        user, about = self._user_of(caller, verbs[0]), _About(verbs[0])
        try:
            job, signed = self._judged(user, only_frame(request, Order).command, verbs, about, check)
            self._log.accepted(user, signed.command.command, about.job, signed.token)
        except SealwrightError as error:
            self._log.refused(user, about.verb, about.job, error, about.token)
            raise
        return job, signed

    def _judged(
        self,
        user: str,
        token: str,
        verbs: tuple[Command, ...],
        about: _About,
        check: Callable[[ServerJob, SignedCommand], None],
    ) -> tuple[ServerJob | None, SignedCommand]:
        charter, at = self._party.charter(), self._party.clock()
        signed = read_command(token, charter)
        command = signed.command
        if command.user != user:
            raise CommandRefused(command.command, user, (f"{user} brings a command of {command.user}",))
        if command.command not in verbs:
            raise CommandRefused(command.command, user, (f"this call takes {' or '.join(verbs)}",))
        about.verb, about.job, about.token = command.command, command.job, token
        job = self._jobs.find(command.job)
        submitter = None if job is None else job.signed.record.submitter
        place = None
        if command.place is not None:
            role: Role = "server" if command.place == self._server else "site"
            enrolled = charter.enrolment(role, command.place)
            if enrolled is None:
                raise CommandRefused(command.command, user, (f"the charter has no {role} {command.place}",))
            place = command.place, enrolled.member
        check_command(signed, charter, at, server=self._server, job=command.job, submitter=submitter, place=place)
        with self._lock:
            self._nonces.take(command, at)
        if command.job is not None:
            if job is None:
                raise PeerLost(f"there is no job {command.job}", where="job")
            check(job, signed)
        return job, signed

    def _user_of(self, caller: Caller, verb: Command) -> str:
        """MEMBER/USER of the caller, by its certificate. Raises PeerRefused."""
        try:
            user = appraise_user(caller.certificate, self._party.charter(), self._party.clock())
        except SealwrightError as error:
            self._log.refused(None, verb, None, error)
            raise
        return f"{user.member}/{user.name}"


class _About:
    """What is known of a command so far, for the entry about its refusal."""

    def __init__(self, verb: Command = "submit") -> None:
        self.verb: Command = verb
        self.job: str | None = None
        self.token = ""


def _has_result_for(job: ServerJob, signed: SignedCommand) -> None:
    if job.result is None:
        why = (
            "; its result is not kept any more"
            if job.status is Status.FINISHED
            else "".join(f": {reason[:300]}" for reason in job.journal.report().reasons[:8])
        )
        raise PeerLost(f"job {job.id} has no result: it is {job.status.value}{why}", where="job")
    if signed.command.user not in job.result[0].keys:
        raise ApprovalRefused(job.id, (f"{signed.command.user} is not among the result's recipients",))


def _is_over(job: ServerJob, signed: SignedCommand) -> None:
    if not job.status.over:
        raise ApprovalRefused(job.id, (f"the job is {job.status.value}: it is deleted when it is over",))


def _may_be_decided(job: ServerJob, signed: SignedCommand) -> None:
    reason = job.why_undecidable(signed)
    if reason is not None:
        raise CommandRefused(signed.command.command, signed.command.user, (reason,))
