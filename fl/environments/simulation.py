"""One job of SimEnv: the rounds, checks and aggregation of production around clients of this machine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from fl.aggregation.custom import ScriptAggregation
from fl.aggregation.mask_talk import MaskingSite, Step
from fl.aggregation.mask_turns import MaskingTurns
from fl.aggregation.notary import SimulatedNotary
from fl.aggregation.robust import robust_aggregation
from fl.environments.checkpoint import FolderKeeper
from fl.environments.clients import ClientProcesses
from fl.environments.display import Display
from fl.errors import (
    JobAborted,
    JobFailed,
    MalformedMessage,
    MaskingRefused,
    OutputRefused,
    RecipeUnusable,
    ScriptFailed,
    UpdateRefused,
)
from fl.guard.disclosure import LoggedLines, LoggedNumbers, disclose, error_feedback
from fl.guard.gate import max_update_size
from fl.guard.watermark import Marker, watermark_key
from fl.jobs.progress import JobEvent, Status, line_of
from fl.jobs.results import BEST_FILE, JOB_FILE, MODEL_FILE, JobHistory, write_file, write_json
from fl.jobs.settings import JobSettings
from fl.local.dp_sgd import what_runs
from fl.model import ParamsType
from fl.server.federation import Aggregation, Federation, Task
from fl.server.workflows import run_workflow
from fl.site.script import END_SECONDS, Session
from fl.tracking import start_tracking, track_result

if TYPE_CHECKING:
    from fl.environments.ray_clients import RayClients
    from fl.environments.sim import SimEnv
    from fl.recipes.recipe import Recipe

LOG_BYTES: Final = 1 << 20
"""So much of the end of a client's log is shown."""
AGGREGATOR: Final = "aggregator"
"""The folder, in a run's, of an aggregator of one's own."""


class Simulation:
    """One job; afterwards the handle of its Run."""

    def __init__(self, env: SimEnv, recipe: Recipe, job_id: str, folder: Path, started: datetime) -> None:
        self._env = env
        self._recipe = recipe
        self._folder = folder
        self._events: list[JobEvent] = []
        self._code, self._script = _code_of(recipe, folder)
        self.history = JobHistory(job_id, recipe.settings, started)

    def run(self, processes: ClientProcesses | RayClients) -> None:
        """Run the job to its end."""
        self._started = processes
        settings = self._recipe.settings
        observers: list[Callable[[JobEvent], None]] = [self.history.observe, self._events.append]
        tracking = start_tracking(settings, self._folder)
        if tracking is not None:
            observers.append(tracking.observe)
        if self._env.log_mode.lines:
            observers.append(_write_line)
        lock = threading.Lock()

        def observe(event: JobEvent) -> None:
            with lock:
                for observer in observers:
                    observer(event)

        self._keeper = FolderKeeper(
            self._folder, self.history, resume=self._env.resume is not None, best=lambda: federation.best
        )
        federation = Federation(
            self.history.job_id,
            settings.schema_of_sum,
            ParamsType(settings.params_type),
            delta=settings.delta,
            min_sites=settings.min_clients,
            round_seconds=settings.round_seconds,
            observe=observe,
            at_once=self._env.at_once,
            keeper=self._keeper,
            aggregation=self._aggregation if settings.aggregator is not None else robust_aggregation(settings),
        )
        federation.notary = SimulatedNotary(self.history.job_id, self._env.clients)
        self._marker = None
        if settings.watermark is not None:  # no owner has a key to this one: it shows what watermarks cost in accuracy
            self._marker = Marker(watermark_key(bytes(32), self.history.job_id), settings.watermark.strength)
        try:
            shown = not self._env.log_mode.lines
            with Display(settings.name, settings.num_rounds, sys.stderr, shown=shown) as display:
                observers.append(display.observe)
                self._run_workflow(federation, processes)
        except JobFailed as failure:
            self._end(Status.FAILED, reasons=failure.reasons)
            sys.stderr.write(f"{failure.what}\n" + "".join(f"  {reason}\n" for reason in failure.reasons[1:]))
        except JobAborted as stop:
            self._end(Status.ABORTED, reasons=stop.reasons)
        except BaseException as error:
            self._end(Status.ABORTED, reasons=(f"interrupted by {type(error).__name__}",))
            raise
        finally:
            if federation.best is not None:
                federation.best.close()
            if self._marker is not None:
                self._marker.close()
            if tracking is not None:
                tracking.close()
            if self._env.log_mode.output:
                for name, text in sorted(self.logs().items()):
                    sys.stderr.write("".join(f"{name}: {line}\n" for line in text.splitlines()))

    def _run_workflow(self, federation: Federation, processes: ClientProcesses | RayClients) -> None:
        settings = self._recipe.settings
        clients = [self._start_client(name, processes, federation) for name in self._env.clients]
        try:
            with self._recipe.first_model() as first:
                result = run_workflow(federation, settings, first)
            with result:
                write_file(self._folder / MODEL_FILE, result.view)
                if federation.best is not None:
                    write_file(self._folder / BEST_FILE, federation.best.view)
                self._end(Status.FINISHED, model=result.digest)
        finally:
            federation.finish("the job is over")
            for client in clients:
                client.stop()
        processes.wait_for_exits(END_SECONDS)  # after a failure nobody is waited for: leaving ends them all

    def _aggregation(self) -> Aggregation:
        """The recipe's own aggregator, in a process as clients have it."""
        settings, processes = self._recipe.settings, self._started
        if settings.aggregator is None or not isinstance(processes, ClientProcesses):
            raise RecipeUnusable("an aggregator of one's own needs the processes backend", where="backend")
        work = self._folder / AGGREGATOR
        work.mkdir(mode=0o700, exist_ok=True)
        session = processes.session(AGGREGATOR, folder=self._code, script=settings.aggregator, arguments=(), work=work)
        return ScriptAggregation(session, settings, self.history.job_id)

    def _start_client(self, name: str, processes: ClientProcesses | RayClients, federation: Federation) -> _Client:
        work = self._folder / name
        work.mkdir(mode=0o700, exist_ok=True)
        script, arguments = self._recipe.settings.script_of(name)
        session = processes.session(
            name,
            folder=self._code,
            script=script if self._recipe.settings.privacy is None else self._script,
            arguments=arguments,
            work=work,
            environment={} if self._env.gpus is None else {"CUDA_VISIBLE_DEVICES": self._env.gpus[name]},
            log_config=self._env.log_mode.clients,
        )
        data = self._env.data[name]
        client = _Client(name, session, federation, self._recipe.settings, self._marker)
        session.greet(
            self.history.job_id,
            self._recipe.settings,
            data=None if data is None else str(data),
            max_update=max_update_size(self._recipe.settings.schema_of_model),
        )
        federation.join(client)
        client.start()
        return client

    def _end(self, status: Status, *, reasons: tuple[str, ...] = (), model: str | None = None) -> None:
        if not self.history.status.over:
            self.history.end(status, datetime.now(UTC), reasons=reasons, model=model)
            record = self.history.document()
            write_json(self._folder / JOB_FILE, record)
            if status is Status.FINISHED:
                self._keeper.clear()
                track_result(self._folder, record)

    def status(self) -> Status:
        return self.history.status

    def result(self, timeout: float | None) -> Path:  # it is over when execute returns
        if self.history.status is Status.FAILED:
            raise JobFailed(self.history.job_id, self.history.reasons)
        if self.history.status is Status.ABORTED:
            raise JobAborted(self.history.job_id, "its author")
        return self._folder

    def abort(self) -> None:
        return

    def events(self) -> list[JobEvent]:
        return list(self._events)

    def logs(self) -> dict[str, str]:
        found = {name: _tail(self._folder / name / "log.txt") for name in self._env.clients}
        return {name: text for name, text in found.items() if text}

    def watch(self, observe: Callable[[JobEvent], None]) -> Status:
        for event in self._events:
            observe(event)
        return self.history.status


class _Client:
    """A simulated client: a thread that carries tasks to its script and updates back."""

    def __init__(
        self, name: str, session: Session, federation: Federation, settings: JobSettings, marker: Marker | None
    ) -> None:
        self.name = name
        self._session = session
        self._federation = federation
        self._settings = settings
        self._logged = LoggedNumbers(settings.outputs, name)
        self._lines = LoggedLines(settings.outputs, name)
        self._marker = marker
        self._round = 0
        secure = settings.secure_aggregation
        self._masking: MaskingTurns | None = None
        if secure is not None:
            site = MaskingSite(name, settings, secure, federation.notary)
            self._masking = MaskingTurns(site, self._answer, lambda error: federation.lose(name, error.what))
        self._feedback = error_feedback(settings)
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._carry, name=f"client {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give(self, task: Task) -> None:
        # The model may be closed with its job while this client still works on it: it has a share of its own.
        model = task.model if self._marker is None else self._marker.of(self.name, task.model)
        self._tasks.put(replace(task, model=model.share()))

    def say(self, round_: int, step: Step, body: str) -> None:
        if self._masking is not None:
            self._masking.hear(round_, step, body)

    def _answer(self, round_: int, step: Step, body: str, _run: str) -> None:
        # Of a client that has been lost in the meantime nothing is expected.
        with suppress(MalformedMessage):
            self._federation.hear(self.name, round_, step, body)

    def end(self, why: str) -> None:  # a script learns that the job is over, not why
        self._tasks.put(None)

    def stop(self) -> None:
        self._tasks.put(None)

    def _carry(self) -> None:
        federation = self._federation
        held = ExitStack()
        try:
            while (task := self._tasks.get()) is not None:
                model = task.model.in_memory()
                held.callback(model.close)
                task.model.close()
                self._logged.begin_round()
                self._lines.begin_round()
                self._round = task.round
                answer, memory = self._session.train(
                    task.round,
                    task.total_rounds,
                    model,
                    seconds=federation.round_seconds,
                    value=self._log,
                    line=self._say,
                    task=task.kind,
                )
                with memory:
                    shown = disclose(
                        memory,
                        params_type=answer.params_type,
                        weight=answer.weight,
                        metrics=answer.metrics,
                        model=model,
                        settings=self._settings,
                        site=self.name,
                        task=task.kind,
                        feedback=self._feedback,
                        masked=None if self._masking is None else partial(self._masking.site.masked, task.round),
                    )
                federation.submit(
                    self.name,
                    answer.round,
                    shown.memory,
                    params_type=ParamsType(answer.params_type),
                    weight=shown.weight,
                    metrics=shown.metrics,
                )
                held.close()
        except UpdateRefused:
            pass  # the federation has noted it and put the client out of the job
        except OutputRefused as refusal:
            federation.lose(self.name, "; ".join(refusal.reasons), kind="refused")
        except (ScriptFailed, MaskingRefused, MalformedMessage) as failure:
            federation.lose(self.name, failure.what)
        finally:
            held.close()
            while not self._tasks.empty():
                if (task := self._tasks.get()) is not None:
                    task.model.close()
            if self._masking is not None:
                self._masking.close()
            self._session.end()
            self._session.close()

    def _say(self, text: str) -> None:
        self._federation.line(self.name, self._lines.disclosed(text), self._round)

    def _log(self, key: str, value: float, step: int) -> None:
        self._federation.value(self.name, key, self._logged.disclosed(key, value), step)


def _write_line(event: JobEvent) -> None:
    if line := line_of(event):
        sys.stderr.write(line + "\n")


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            return file.read(LOG_BYTES).decode(errors="replace")
    except OSError:
        return ""  # the client has printed nothing


def _code_of(recipe: Recipe, folder: Path) -> tuple[Path, str]:
    """The folder of what each client runs, and the script in it: the recipe's own, or the trusted loop's."""
    settings = recipe.settings
    if settings.privacy is None and (recipe.added or recipe.large):
        code = folder / "code"
        _link_entries(recipe.folder, code)
        for path in (*recipe.added, *(file.path for file in settings.files)):
            for parent in reversed(Path(path).parents[:-1]):
                if (code / parent).is_symlink():  # the folder has one of this name: both have to be seen
                    (code / parent).unlink()
                    _link_entries(recipe.folder / parent, code / parent)
                (code / parent).mkdir(mode=0o700, exist_ok=True)
        for path, content in recipe.added.items():
            write_file(code / path, content)
        for file in settings.files:
            if not (code / file.path).is_symlink():
                (code / file.path).symlink_to(recipe.large[file.sha256])
        return code, settings.train_script
    if settings.privacy is None:
        return recipe.folder, settings.train_script
    graph = (recipe.folder / settings.train_script).read_bytes()
    files, script = what_runs({settings.train_script: graph}, settings, settings.train_script)
    code = folder / "loop"
    code.mkdir(mode=0o700, exist_ok=True)
    for name, content in files.items():
        write_file(code / name, content)
    return code, script


def _link_entries(folder: Path, code: Path) -> None:
    """Links to all that may be in a bundle, whatever else lies in the folder (the runs themselves, perhaps)."""
    code.mkdir(mode=0o700, exist_ok=True)
    for entry in folder.iterdir():
        link = code / entry.name
        if not entry.name.startswith(".") and entry.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(entry)
