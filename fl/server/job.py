"""One job at the server, from its submission to its sealed result."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fl.aggregation.mask_talk import Step, parts
from fl.aggregation.notary import AttestedNotary
from fl.aggregation.robust import robust_aggregation
from fl.errors import JobAborted, MalformedMessage, UpdateRefused
from fl.guard.approval import SignedRecord, approve, check_lock
from fl.guard.command import SignedCommand
from fl.guard.watermark import Marker, watermark_key
from fl.jobs.bundle import Bundle
from fl.jobs.large_files import SLOWEST
from fl.jobs.log_lines import rewritten
from fl.jobs.packages import packages_here
from fl.jobs.progress import JobEvent, Status
from fl.jobs.record import record_digest
from fl.jobs.sealing import SealedResult
from fl.jobs.statement import SignedStatement
from fl.model import ParamsType
from fl.party import Party
from fl.server.aggregator import SandboxedAggregation
from fl.server.arrivals import Arrivals
from fl.server.federation import Federation, Task
from fl.server.job_inputs import JobInputs
from fl.server.job_store import EndedJob, JobStore, StoredJob
from fl.server.journal import Journal
from fl.server.outcome import seal_outcome
from fl.server.tree_job import evaluating, root_of, run_root
from fl.server.workflows import run_workflow
from fl.transport.chunks import Assembly
from fl.transport.frames import Deliver, Finish, Masking, Prepare, Told, Train
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored
from policies.errors import Refused, SealwrightError

if TYPE_CHECKING:
    from fl.edge.root import RootJob
    from fl.server.attendance import Attendance

JOIN_SECONDS: Final = 60.0
"""How long a starting job waits for the sites of its roster."""


class RemoteSite:
    """A site of a running job, as the algorithm knows it."""

    def __init__(self, attendance: Attendance, job: ServerJob) -> None:
        self.attendance = attendance
        self._job = job

    @property
    def name(self) -> str:
        return self.attendance.name

    def give(self, task: Task) -> None:
        model = self._job.serve_model(task.model, self.name)
        self.attendance.send(
            Train(
                job=self._job.id,
                task=task.kind,
                round=task.round,
                total_rounds=task.total_rounds,
                model_sha256=model.digest,
                model_size=model.size,
            )
        )

    def say(self, round_: int, step: Step, body: str) -> None:
        for piece, more in parts(body):
            self.attendance.send(
                Masking(job=self._job.id, round=round_, step=step, body=piece, more=more, run=self._job.run_name)
            )

    def end(self, why: str) -> None:
        if not self._job.suspended:
            self.attendance.send(Finish(job=self._job.id, why=why[:2000]))


class ServerJob:
    """A submitted job. `run` is called once, by the thread that runs it; the rest from any thread."""

    def __init__(
        self,
        party: Party,
        server: str,
        signed: SignedRecord,
        bundle: Bundle,
        *,
        sealed_model: Stored,
        sealed_files: Mapping[str, Stored] | None = None,
        model_key: bytes,
        store: JobStore | None = None,
        received: datetime | None = None,
    ) -> None:
        """`store`: where it is kept until it is over; `received`: when it came, if a server of before took it."""
        self.id = signed.record.job
        self.signed = signed
        self.bundle = bundle
        self._party = party
        self._server = server
        self.run_name = os.urandom(16).hex()
        """Of this server's part of the job: masks that were agreed on with another mean nothing to it."""
        self._received = received or party.clock()
        self._again = received is not None
        self.journal = Journal(signed.record, bundle.settings, self._received)
        """What the job's users read."""
        self._served: Stored | None = None
        self._spool = None if store is None else store.spool
        self._inputs = JobInputs(sealed_model, sealed_files or {}, model_key, signed.record, self._spool)
        self._arrivals = Arrivals(self._spool, lambda: not self.status.over)
        self._stopped_by: str | None = None
        self.tree: RootJob | None = None
        """The root of the tree, while an edge job runs."""
        self.suspended = False
        """Whether the job goes on with the next server, of which its sites need not be told."""
        self._counting = threading.Lock()
        self._logged: dict[str, int] = {}
        self._said: dict[str, int] = {}  # bytes of text of each site in this round
        self._present: dict[str, Attendance] = {}
        self._rejections: dict[str, SignedCommand] = {}
        self.result: tuple[SealedResult, SignedStatement, str] | None = None
        settings = bundle.settings
        self._federation = Federation(
            self.id,
            settings.schema_of_sum,
            ParamsType(settings.params_type),
            delta=settings.delta,
            min_sites=settings.min_clients,
            round_seconds=settings.round_seconds,
            observe=self._observe,
            spool=self._spool,
            keeper=None if store is None else store.keeper(self.id, self.journal.history, lambda: self._federation),
            aggregation=(
                robust_aggregation(settings)
                if settings.aggregator is None
                else lambda: SandboxedAggregation(bundle, self.id)
            ),
        )

        watermark = settings.watermark
        self._marker = None
        if watermark is not None:
            self._marker = Marker(watermark_key(model_key, self.id), watermark.strength)
        if settings.secure_aggregation is not None:
            record = signed.record
            self._federation.notary = AttestedNotary(party, record.roster, record_digest(signed.token))

    # what the service calls

    def restore(self, ended: EndedJob) -> None:
        """This job is over: a server of before ran it, and this became of it."""
        history = self.journal.history
        self.journal.restore(ended.events)
        history.started = ended.started
        history.end(ended.status, ended.finished, reasons=ended.reasons)
        self.result = ended.result
        self._inputs.close()

    def ended(self) -> EndedJob:
        """What became of the job, which is over."""
        history = self.journal.history
        finished = history.finished or self._party.clock()
        return EndedJob(self.status, history.reasons, history.started, finished, self.journal.events, self.result)

    def stored(self) -> StoredJob:
        """The job as it came. Before it runs."""
        inputs = self._inputs
        return StoredJob(self.signed.token, self.bundle.raw, inputs.sealed_model, self._received, inputs.sealed_files)

    @property
    def status(self) -> Status:
        """Where the job is in its life."""
        return self.journal.status

    @property
    def result_size(self) -> int:
        """Bytes of the sealed result that is kept; 0 if there is none."""
        result = self.result
        return 0 if result is None else result[0].payload.size

    def connected(self, attendance: Attendance) -> None:
        """A site is connected: if the job waits for it, it is judged as a peer and asked to prepare."""
        if self.status is Status.RUNNING and self._is_for(attendance):
            rejection = self._rejection_of(attendance.name)
            if rejection is not None:
                attendance.send(Told(job=self.id, command=rejection.token))
                return
            attendance.check(anew=True)
            attendance.send(Prepare(job=self.id, record=self.signed.token, bundle_size=len(self.bundle.raw)))

    def _is_for(self, attendance: Attendance) -> bool:
        """Whether the site is on the roster; that of an edge job names nodes of its tree, which do not attend."""
        return attendance.name in self.signed.record.roster and self.bundle.settings.recipe != "fedbuff"

    def ready(self, attendance: Attendance) -> None:
        """A site's script has started."""
        if self.status is Status.RUNNING and attendance.name in self.signed.record.roster:
            if self._present.get(attendance.name) is attendance:
                return  # a site that comes back may say so twice
            self._present[attendance.name] = attendance
            site = RemoteSite(attendance, self)
            if self._federation.resume(site):
                return
            try:
                self._federation.join(site)
            except UpdateRefused as refusal:
                attendance.send(Finish(job=self.id, why=refusal.what[:2000]))

    def heard(self, name: str, frame: Masking) -> None:
        """A site answers in secure aggregation. Raises MalformedMessage if it was not asked, or answers in pieces."""
        if frame.more:
            raise MalformedMessage("an answer about secure aggregation is in pieces", where=name)
        if frame.run != self.run_name:
            return  # it was on its way to a server that was killed
        self._federation.hear(name, frame.round, frame.step, frame.body)

    def left(self, name: str, reason: str) -> None:
        """A site is out of the job."""
        if self.status is Status.RUNNING and name in self.signed.record.roster:
            self._federation.lose(name, reason)

    def away(self, name: str, reason: str, *, cut: bool) -> None:
        """The site's connection has ended, by a cut or by a lease: the job waits for the site, within bounds."""
        if self.status is Status.RUNNING and name in self.signed.record.roster:
            self._federation.suspend(name, reason, cut=cut)

    def await_turn(self, attendance: Attendance, round_: int | None) -> None:
        """Wait, within bounds, until a site that attends again is back in the job and has its task.

        A transfer that goes on after a cut, or with a server that took the job up, may come before its site's word.
        """
        self._federation.await_turn(attendance.name, round_, lambda: not (attendance.ended or self.status.over))

    def is_settled(self, name: str, round_: int) -> bool:
        """Whether a site that was away in this round has nothing to deliver for it any more."""
        return self._federation.is_settled(name, round_)

    def logged(self, name: str, key: str, value: float, step: int, *, most: int) -> None:
        """A site's script logged a number. Raises MalformedMessage after `most` of one site in one round."""
        with self._counting:
            count = self._logged[name] = self._logged.get(name, 0) + 1
        if count > most:
            raise MalformedMessage(f"the site has logged more than {most} values in a round", where=name)
        self._federation.value(name, key, value, step)

    def said(self, name: str, text: str, round_: int) -> None:
        """A site's script logged a line. Raises MalformedMessage for what the job does not declare."""
        outputs = self.bundle.settings.outputs
        try:
            wanted = rewritten(text, outputs.lines, outputs.digits)
        except ValueError as error:
            raise MalformedMessage(
                f"the site has logged text that the job does not declare: {error}", where=name
            ) from error
        with self._counting:
            count = self._said[name] = self._said.get(name, 0) + len(text) + 1
        if wanted != text or count > outputs.line_bytes:
            raise MalformedMessage("the site has logged more text than the job declares", where=name)
        self._federation.line(name, text, round_)

    def serve_model(self, model: Stored, site: str = "") -> Stored:
        """From now on the sites fetch this model; as `site` gets it, which may be with a watermark."""
        self._served = model
        return model if self._marker is None else self._marker.of(site, model)

    def model(self, sha256: str) -> Stored | None:
        """The model that is served, if it is the one that is asked for."""
        served = self._served
        if self._marker is not None:
            return self._marker.find(sha256)
        return served if served is not None and served.digest == sha256 else None

    def file(self, sha256: str) -> Stored | None:
        """A large file of the bundle, while the job runs."""
        return self._inputs.file(sha256)

    def arriving(self, name: str, head: Deliver) -> AbstractContextManager[Assembly]:
        """Where a site's update is put together (`Arrivals.of`).

        Raises UpdateRefused for one that has other masks than this server knows.
        """
        if self.bundle.settings.secure_aggregation is not None and head.run != self.run_name:
            raise UpdateRefused(name, ("it is under the masks of another run of the server",))
        return self._arrivals.of(name, head)

    def deliver(self, name: str, head: Deliver, memory: Stored) -> None:
        """A site's whole update. Raises UpdateRefused."""
        self._federation.submit(
            name,
            head.round,
            memory,
            params_type=ParamsType(head.params_type),
            weight=head.weight,
            metrics=head.metrics,
        )

    def abort(self, by: str) -> None:
        """Stop the job."""
        self._stopped_by = by
        self._federation.abort(by)

    def suspend(self, by: str) -> None:
        """The server stops: the job ends here without an end, and goes on from its store with the next server."""
        self.suspended = True
        self.abort(by)

    def why_undecidable(self, signed: SignedCommand) -> str | None:
        """Why a member's word on this job changes nothing; None if it does."""
        member = signed.user.member
        if self.status.over:
            return f"the job is {self.status.value}"
        if not any(self._member_of(site) == member for site in self.signed.record.roster):
            return f"no site of {member} is on the job's roster"
        if signed.command.command == "reject":
            return None
        if member not in self._rejections:
            return f"{member} has not rejected the job"
        return None if self.status is Status.QUEUED else "the job has begun without its sites"

    def decide(self, signed: SignedCommand) -> None:
        """Take a member's word: `reject` takes its sites out of the job, `approve` takes that back before it begins."""
        member = signed.user.member
        if signed.command.command == "approve":
            self._rejections.pop(member, None)
            return
        self._rejections[member] = signed
        for site in self.signed.record.roster:
            if self._member_of(site) == member:
                self.left(site, _rejected(signed))

    def _member_of(self, site: str) -> str | None:
        place = self._party.charter().enrolment("site", site)
        return None if place is None else place.member

    def _rejection_of(self, site: str) -> SignedCommand | None:
        return self._rejections.get(self._member_of(site) or "")

    # the job's own thread

    def run(self, attending: Callable[[], list[Attendance]]) -> None:
        """Run the job to its end, whatever that is; afterwards `status` is over, unless it was suspended."""
        try:
            if self._stopped_by is not None:
                raise JobAborted(self.id, self._stopped_by)
            self._check()
            check_lock(self.signed.record, self.bundle, packages_here())
            self._party.record("job", self._entry("resumed" if self._again else "started"))
            self.journal.history.started = self._party.clock()
            self._set_status(Status.RUNNING)
            with tempfile.TemporaryDirectory(prefix="sealwright-", dir=memory_folder()) as folder:
                self._run_rounds(attending, Path(folder))
        except JobAborted as stop:
            if not self.suspended:
                self._end(Status.ABORTED, stop.reasons)
        except SealwrightError as error:
            self._end(Status.FAILED, error.reasons if isinstance(error, Refused) else (error.what,))
        except Exception as error:  # a fault of ours: the job has to end in any case, and the fault has to be seen
            self._end(Status.FAILED, (f"the server failed: {type(error).__name__}",))
            raise
        finally:
            self._federation.finish("the job is over")
            self._arrivals.close()
            if self._federation.best is not None:
                self._federation.best.close()
            self._served = None
            if self._marker is not None:
                self._marker.close()
            self._inputs.close()

    def _run_rounds(self, attending: Callable[[], list[Attendance]], folder: Path) -> None:
        settings = self.bundle.settings
        record = self.signed.record
        tracking = None
        if settings.tracking == "tensorboard":
            from fl.tracking.tensorboard import TensorBoardTracking

            tracking = TensorBoardTracking(folder / "events")
            self.journal.tracking = tracking.observe
        try:
            with self._inputs.first_model(settings) as first:
                self._inputs.open_files(settings)
                for site in record.roster:
                    if (rejection := self._rejection_of(site)) is not None:
                        self._federation.lose(site, _rejected(rejection))
                for attendance in attending():
                    self.connected(attendance)
                if settings.recipe == "fedbuff":
                    model = self._run_tree(first)
                else:
                    pulling = sum(file.size for file in settings.files) / SLOWEST
                    self._federation.gather(record.roster, JOIN_SECONDS + pulling)
                    model = run_workflow(self._federation, settings, first)
        finally:
            self.journal.tracking = None
            if tracking is not None:
                tracking.close()
        with model:
            self.result = seal_outcome(
                self._party,
                self._server,
                self.signed,
                self.journal.history,
                model,
                best=self._federation.best,
                events={path.name: path.read_bytes() for path in sorted(folder.glob("events/events.*"))},
                spool=self._spool,
            )
        self._set_status(Status.FINISHED)

    def _run_tree(self, first: Stored) -> Stored:
        """Be the root of the job's tree; the last version."""
        keeper = self._federation.keeper
        with evaluating(self.bundle, self.id, self._keep_best) as evaluator:
            root = root_of(self.id, self.signed.token, self.bundle, first.in_memory(), self._observe, keeper, evaluator)
            try:
                self.tree = root
                return run_root(root, lambda: self._stopped_by)
            finally:
                root.end()
                self.tree = None
                root.close()

    def _keep_best(self, model: SealedMemory) -> None:
        before, self._federation.best = self._federation.best, model.share()
        if before is not None:
            before.close()

    def _check(self) -> None:
        party = self._party
        approve(
            self.signed,
            self.bundle,
            party.charter(),
            party.clock(),
            server=self._server,
            site=None,
            received=self._received,
        )

    def _entry(self, event: str, **more: object) -> dict[str, object]:
        record = self.signed.record
        return {"event": event, "job": self.id, "name": record.name, "record": self.signed.token, **more}

    def _end(self, status: Status, reasons: tuple[str, ...]) -> None:
        self.journal.history.end(status, self._party.clock(), reasons=reasons)
        self._party.tell(f"job {self.id} {status.value}: {reasons[0] if reasons else ''}")
        try:
            self._party.record("job", self._entry(status.value, reasons=list(reasons[:64])))
        except SealwrightError as error:
            self._party.tell(f"job {self.id}: its end is not in the ledger: {error.what}")
        self._set_status(status)

    def _set_status(self, status: Status) -> None:
        self.journal.set_status(status)
        self._party.tell(f"job {self.id} is {status.value}")

    def _observe(self, event: JobEvent) -> None:
        if event.kind == "round":
            self._check()  # a bundle that was revoked, or a submitter without rights, ends here
            self._logged.clear()
            self._said.clear()
        self.journal.observe(event)
        if event.kind in {"joined", "lost", "refused", "paused", "resumed"}:
            self._party.tell(f"job {self.id}: {event.site} {event.kind}{': ' if event.text else ''}{event.text}")


def _rejected(signed: SignedCommand) -> str:
    why = f": {signed.command.why}" if signed.command.why else ""
    return f"{signed.command.user} has rejected the job{why}"


def memory_folder() -> str | None:
    """A folder in memory for what must not lie on a disk; None (the system's default) where there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder is made in it
