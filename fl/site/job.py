"""One job at a site: approved here, sandboxed here, checked here before anything leaves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol

from fl.aggregation.mask_talk import MaskingSite, Step
from fl.aggregation.mask_turns import MaskingTurns
from fl.aggregation.notary import AttestedNotary
from fl.errors import ApprovalRefused, MalformedMessage, RoundOver, ScriptFailed, UpdateRefused
from fl.guard.approval import SignedRecord, approve, check_lock, read_record
from fl.guard.command_log import CommandLog
from fl.guard.disclosure import Disclosure
from fl.guard.failure_place import failure_place
from fl.guard.gate import max_update_size
from fl.guard.limits import Limits
from fl.guard.sandbox import Sandbox
from fl.jobs.bundle import MAX_BUNDLE, Bundle, parse_bundle
from fl.jobs.packages import packages_here
from fl.jobs.record import record_digest
from fl.jobs.settings import JobSettings
from fl.local.dp_sgd import what_runs
from fl.party import Party
from fl.site.exports import SiteExports, caused_by_script, words_that_leave
from fl.site.files import pulled_files
from fl.site.script import END_SECONDS, ScriptSession
from fl.transport.frames import Deliver, Fetch, Left, Logged, Masking, Prepare, Ready, Said, Train, Verdict
from fl.transport.local import ScriptSocket
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored
from policies.errors import SealwrightError

if TYPE_CHECKING:
    from fl.guard.sandbox import SandboxedProcess

REPORT_SECONDS: Final = 5.0
"""How long the sandbox may take to tell what became of a script whose socket has closed."""
WATCH_SECONDS: Final = 2.0
"""Between two looks whether a running job is still approved: a withdrawal comes with the charter, once a lease."""
DATA_FOLDER: Final = "/data"
"""Where a sandboxed script finds its site's data."""


class ServerLink(Protocol):
    """What a job needs from the site's connection to the server."""

    def send(self, frame: Ready | Left | Logged | Said | Masking) -> None:
        """Send a frame on the attendance."""

    def fetch(self, what: Fetch, *, size: int, seconds: float, sha256: str | None = None) -> SealedMemory:
        """Pull a transfer, whose digest has to be `sha256` if that is given. Raises PeerLost, MalformedMessage."""

    def deliver(self, head: Deliver, memory: Stored, *, seconds: float) -> Verdict:
        """Deliver an update. Raises PeerLost, MalformedMessage."""


class SiteJob:
    """A job that the server asked this site to take part in. It has a thread of its own."""

    def __init__(
        self,
        party: Party,
        site: str,
        server: str,
        link: ServerLink,
        data: Mapping[str, bytes],
        limits: Limits,
        prepare: Prepare,
        log: CommandLog,
    ) -> None:
        self.submitter: str | None = None
        """Who submitted the job, once its record has been checked here."""
        self._commands = log
        self.id = prepare.job
        self._party = party
        self._site = site
        self._server = server
        self._link = link
        self._data = data
        self._limits = limits
        self._prepare = prepare
        self._tasks: SimpleQueue[Train | None] = SimpleQueue()
        self._masking: MaskingTurns | None = None
        self._stopped = threading.Event()
        self._process: SandboxedProcess | None = None
        self._exports: SiteExports | None = None
        self._withdrawn: SealwrightError | None = None
        self._training = False
        self._next_round = 0
        self._ready = False
        self._given = -1
        self._resumed = False
        self._delivered: tuple[Train, Deliver, Stored] | None = None  # the last update that the server took
        self._roster = 0
        self.thread = threading.Thread(target=self._run, name=f"job {self.id}", daemon=True)

    def train(self, task: Train | Masking) -> None:
        """The server gave a task. After a pause it may give the last one again, which is at work already.

        A server that was killed since has lost the update that it took: it gets the same one once more.
        """
        if isinstance(task, Masking):
            if self._masking is not None:
                self._masking.hear(task.round, task.step, task.body, more=task.more, run=task.run)
            else:
                what = "the server asks for secure aggregation, which the job does not have"
                self._withdraw(MalformedMessage(what, where="task"))
            return
        resumed, self._resumed = self._resumed, False
        if resumed and task.round == self._given and (self._delivered is None or self._delivered[0] != task):
            return
        self._given = task.round
        self._tasks.put(task)

    def resume(self) -> None:
        """The site attends again after a pause: tell the server that this job has gone on."""
        self._resumed = True
        if self._masking is not None:
            self._masking.reconnected()
        if self._ready:
            self._link.send(Ready(job=self.id))

    def finish(self) -> None:
        """The job is over for this site. A script that is in the middle of a round is ended."""
        self._tasks.put(None)
        self._hold_nothing_back()
        self._await_no_masks()
        process = self._process
        if self._training and process is not None:
            process.kill()

    def stop(self) -> None:
        """End the job at once, whatever its script does."""
        self._stopped.set()
        self._tasks.put(None)
        self._hold_nothing_back()
        self._await_no_masks()
        process = self._process
        if process is not None:
            process.kill()

    def _run(self) -> None:
        received = self._party.clock()
        try:
            signed, bundle = self._taken()
            self._party.tell(f"job {self.id} is approved here: {signed.record.name} by {signed.record.submitter}")
            exports = SiteExports(
                self._party, signed.record, bundle, self._site, send_value=self._log, send_line=self._say
            )
            self._exports = exports
            exports.begin_job()
            secure = bundle.settings.secure_aggregation
            if secure is not None:
                notary = AttestedNotary(self._party, signed.record.roster, record_digest(signed.token))
                site = MaskingSite(self._site, bundle.settings, secure, notary)
                self._masking = MaskingTurns(site, self._answer, self._withdraw)
            self._run_script(bundle, exports, lambda: self._approve(signed, bundle, received))
        except SealwrightError as failure:
            error = self._withdrawn or failure
            if caused_by_script(error) and self._exports is not None:
                self._exports.await_release()
            reasons = words_that_leave(error)
            self._party.tell(f"job {self.id}: {reasons[0]}")
            self._link.send(Left(job=self.id, reasons=reasons))
        else:
            self._party.tell(f"job {self.id} is over here")
        finally:
            self._await_no_masks()

    def _taken(self) -> tuple[SignedRecord, Bundle]:
        """The record and the bundle, approved here; it is in the ledger then, or that it was refused."""
        record = self._prepare.record
        try:
            signed, bundle = self._approved()
        except ApprovalRefused as error:
            self._commands.refused(self.submitter, "submit", self.id, error, record_digest(record))
            raise
        entry = {"event": "taken", "job": self.id, "bundle": bundle.digest, "site": self._site}
        self._party.record(
            "job", {**entry, "submitter": signed.record.submitter, "record_sha256": record_digest(record)}
        )
        return signed, bundle

    def _approved(self) -> tuple[SignedRecord, Bundle]:
        """The record and the bundle, both checked here. Raises ApprovalRefused, MalformedMessage, PeerLost."""
        prepare = self._prepare
        signed = read_record(prepare.record, self._party.charter())
        if signed.record.job != self.id:
            raise ApprovalRefused(self.id, (f"its record is that of job {signed.record.job}",))
        self.submitter = signed.record.submitter
        self._roster = len(signed.record.roster)
        if not 0 < prepare.bundle_size <= MAX_BUNDLE:
            raise MalformedMessage(f"the bundle has {prepare.bundle_size} bytes", where="bundle")
        request = Fetch(job=self.id, what="bundle", sha256=signed.record.bundle, offset=0)
        with self._link.fetch(request, size=prepare.bundle_size, seconds=60) as memory:
            bundle = parse_bundle(bytes(memory.view))
        self._approve(signed, bundle, self._party.clock())
        check_lock(signed.record, bundle, packages_here())
        return signed, bundle

    def _approve(self, signed: SignedRecord, bundle: Bundle, received: datetime) -> None:
        party = self._party
        approve(
            signed,
            bundle,
            party.charter(),
            party.clock(),
            server=self._server,
            site=self._site,
            received=received,
        )

    def _await_no_masks(self) -> None:
        if self._masking is not None:
            self._masking.close()

    def _hold_nothing_back(self) -> None:
        if self._exports is not None:
            self._exports.stop()

    def _run_script(self, bundle: Bundle, exports: SiteExports, check: Callable[[], None]) -> None:
        settings = bundle.settings
        own_script, arguments = settings.script_of(self._site)
        files, script = what_runs(bundle.files, settings, own_script)
        with pulled_files(self._link, settings.files, self.id, self._site) as large:
            sandbox = Sandbox(files, script, arguments, self._data, large=large, limits=self._limits)
            ours, theirs = ScriptSocket.pair()
            try:
                with theirs:
                    process = sandbox.start(theirs)
            except BaseException:
                ours.close()
                raise
        self._process = process
        with process, self._watched(check):
            session = ScriptSession(ours, site=self._site, how_it_ended=lambda: _how_it_ended(process, bundle.files))
            try:
                limit = max_update_size(settings.schema_of_model)
                session.greet(self.id, settings, data=DATA_FOLDER if self._data else None, max_update=limit)
                self._ready = True
                self._link.send(Ready(job=self.id))
                while (task := self._tasks.get()) is not None:
                    check()
                    self._training = True
                    try:
                        self._train(session, settings, task, limit, exports)
                    except RoundOver:
                        self._party.tell(f"job {self.id}: round {task.round} went on without this site")
                    self._training = False
                if self._withdrawn is not None:
                    raise self._withdrawn
                if self._stopped.is_set():
                    raise ScriptFailed(self._site, "was stopped")
                session.end()
                process.wait(END_SECONDS)
            finally:
                session.close()
                self._process = None
                if self._delivered is not None:
                    self._delivered[2].close()
                    self._delivered = None

    @contextmanager
    def _watched(self, check: Callable[[], None]) -> Iterator[None]:
        """Look again and again whether the job may run still; when it may not, end the script in the middle."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(WATCH_SECONDS):
                try:
                    check()
                except SealwrightError as error:
                    self._withdraw(error)
                    return

        watcher = threading.Thread(target=watch, name=f"approval of {self.id}", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()

    def _train(
        self, session: ScriptSession, settings: JobSettings, task: Train, limit: int, exports: SiteExports
    ) -> None:
        if self._delivered is not None:
            taken, head, memory = self._delivered
            self._delivered = None
            if taken == task:
                self._hand_over(task, head, memory, float(settings.round_seconds))
                return
            memory.close()
        turn = task.total_rounds == settings.num_rounds and task.round >= self._next_round
        if not turn or not settings.asks_for(task.task, task.round, self._roster):
            raise MalformedMessage(
                f"the server asks for round {task.round} of {task.total_rounds} ({task.task}), out of turn: each is "
                "approved once",
                where="task",
            )
        self._next_round = task.round + 1
        if not 0 < task.model_size <= limit:
            raise MalformedMessage(f"the model has {task.model_size} bytes, more than {limit}", where="task")
        seconds = float(settings.round_seconds)
        request = Fetch(job=self.id, what="model", sha256=task.model_sha256, offset=0)
        with self._link.fetch(request, size=task.model_size, seconds=seconds) as model:
            exports.begin_round(task.round)
            answer, memory = session.train(
                task.round,
                task.total_rounds,
                model,
                seconds=seconds,
                value=exports.value,
                line=exports.line,
                task=task.task,
            )
            with memory:
                masked = None if self._masking is None else partial(self._masking.site.masked, task.round)
                shown = exports.update(answer, memory, model, task.task, masked)
        self._hand_over(task, self._head(task, settings, shown), shown.memory, seconds)

    def _hand_over(self, task: Train, head: Deliver, memory: Stored, seconds: float) -> None:
        """Deliver an update, and keep it for a server that loses it; under masks of a server that was killed since,
        the same numbers once more under those of the next. Raises UpdateRefused."""
        try:
            while True:
                if self._masking is not None and self._masking.site.is_outworn:
                    with memory:
                        memory = self._masking.site.masked_again(task.round, memory)
                    head = self._named(head)
                verdict = self._link.deliver(head, memory, seconds=seconds)
                if verdict.accepted:
                    self._delivered = task, head, memory
                    return
                if self._masking is None or not self._masking.site.is_outworn:
                    raise UpdateRefused(self._site, verdict.reasons or ("the server gave no reason",))
        except BaseException:
            memory.close()
            raise

    def _named(self, head: Deliver) -> Deliver:
        """With a name of its own for the update's bytes, and the run whose masks it has."""
        run = "" if self._masking is None else self._masking.site.worn_in
        return head.model_copy(update={"transfer": os.urandom(16).hex(), "run": run})

    def _answer(self, round_: int, step: Step, body: str, run: str) -> None:
        """Answer a step of secure aggregation."""
        if self._withdrawn is None:
            self._link.send(Masking(job=self.id, round=round_, step=step, body=body, run=run))

    def _withdraw(self, error: SealwrightError) -> None:
        """End the job here because of `error`, whatever the script is at."""
        self._withdrawn = error
        self._tasks.put(None)
        process = self._process
        if process is not None:
            process.kill()

    def _log(self, key: str, value: float, step: int) -> None:
        self._link.send(Logged(job=self.id, key=key, value=value, step=step))

    def _say(self, text: str) -> None:
        self._link.send(Said(job=self.id, round=max(0, self._given), text=text))

    def _head(self, task: Train, settings: JobSettings, shown: Disclosure) -> Deliver:
        head = Deliver(
            job=self.id,
            round=task.round,
            params_type="FULL" if task.task == "submit_model" else settings.params_type,
            weight=shown.weight,
            metrics=dict(shown.metrics),
            size=shown.memory.size,
        )
        return self._named(head)


def _how_it_ended(process: SandboxedProcess, files: Mapping[str, bytes]) -> str:
    outcome = process.wait(REPORT_SECONDS)
    if outcome is None:
        return "closed its connection to the job before the job was over"
    place = failure_place(outcome.log, files) if outcome.kind == "failed" else None
    return outcome.sentence if place is None else f"{outcome.sentence}: {place}"
