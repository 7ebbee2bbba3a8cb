"""SimEnv: a federation on this machine, for development. No attestation, no released keys, no site's data.

Every client's script runs in a process of its own, forked from one that has torch imported already, in its own folder
with its own log. The rounds, checks and aggregation are those of production.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Literal

from fl.aggregation.custom import ScriptAggregation
from fl.aggregation.mask_talk import MaskingSite, Step
from fl.aggregation.mask_turns import MaskingTurns
from fl.aggregation.notary import SimulatedNotary
from fl.aggregation.robust import robust_aggregation
from fl.environments.checkpoint import FolderKeeper
from fl.environments.clients import ClientProcesses
from fl.environments.display import Display
from fl.environments.keeping_out import (
    on_this_machine,
    refuse_in_guest,
    refuse_kit,
    refuse_remote_cluster,
    refuse_site_data,
)
from fl.environments.logging_modes import LogMode, read_log_config
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
from fl.jobs.lock import LOCK_FILE, own_lock, refuse_broken
from fl.jobs.packages import packages_here
from fl.jobs.progress import JobEvent, Status, line_of
from fl.jobs.results import BEST_FILE, JOB_FILE, MODEL_FILE, JobHistory, write_file, write_json
from fl.jobs.settings import NAME_PATTERN, JobSettings
from fl.local.dp_sgd import what_runs
from fl.model import ParamsType
from fl.run import Run
from fl.server.federation import Aggregation, Federation, Task
from fl.server.workflows import run_workflow
from fl.site.script import END_SECONDS, Session
from fl.tracking import start_tracking, track_result

if TYPE_CHECKING:
    from fl.environments.ray_clients import RayClients
    from fl.recipes.recipe import Recipe

MAX_CLIENTS: Final = 10_000
NAME: Final = re.compile(NAME_PATTERN)
NAME_OF_RUN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
GPUS: Final = re.compile(r"(\d{1,4}|\[\d{1,4}(,\d{1,4})*\])(,(\d{1,4}|\[\d{1,4}(,\d{1,4})*\]))*")
LOG_BYTES: Final = 1 << 20
"""So much of the end of a client's log is shown."""
AGGREGATOR: Final = "aggregator"
"""The folder, in a run's, of an aggregator of one's own."""


class SimEnv:
    """Simulate a federation with one process per client."""

    def __init__(
        self,
        clients: Sequence[str] | None = None,
        num_clients: int | None = None,
        *,
        num_threads: int | None = None,
        gpu_config: str | None = None,
        log_config: str | Path | None = None,
        backend: Literal["processes", "ray"] = "processes",
        resume: str | None = None,
        data: str | Path | Mapping[str, str | Path] | None = None,
        workspace_root: str | Path | None = None,
    ) -> None:
        """Arguments:

        - `clients` or `num_clients`: the clients' names, or how many (then `site-1`, `site-2`, ...).
        - `num_threads`: how many clients train at the same time (default: the machine's cores).
        - `gpu_config`: which GPUs clients see, dealt to them in turn: "0,1" gives each client one, "[0,1],[2,3]" two.
        - `log_config`: "concise" (live progress in a terminal or a notebook; the default), "full" (a line for each
          event), "verbose" (what clients print too), or a JSON file for the clients' `logging.config.dictConfig`.
        - `backend`: "processes" of this machine, or "ray": actors of a Ray cluster, one for each client.
        - `resume`: a run's id: it goes on in its folder after its last whole round.
        - `data`: what `flare.data_path` finds: a folder with one subfolder per client, or a folder for each client.
        - `workspace_root`: where results go (default: `~/.local/share/sealwright/runs`).

        Raises RecipeUnusable with the argument that is wrong, and SimulationRefused in a guest and in a job's script,
        for a site's sealed data, for a kit, and for an address of another machine.
        """
        refuse_in_guest()
        names = client_names(clients, num_clients, most=MAX_CLIENTS, where="SimEnv")
        if backend not in ("processes", "ray"):
            raise RecipeUnusable(f'backend is {backend!r}, not "processes" or "ray"', where="backend")
        if num_threads is not None and num_threads < 1:
            raise RecipeUnusable(f"num_threads is {num_threads}, not at least 1", where="num_threads")
        if resume is not None and not NAME_OF_RUN.fullmatch(resume):
            raise RecipeUnusable(f"{resume!r} is no run's id", where="resume")
        self.gpus = gpus_of(names, gpu_config)
        self.log_mode: LogMode = read_log_config(log_config)
        self.backend = backend
        self.resume = resume
        cores = len(os.sched_getaffinity(0))
        self.clients = names
        self.at_once = max(1, num_threads if num_threads is not None else cores)
        self.threads_each = max(1, cores // min(self.at_once, len(names)))
        if backend == "ray":
            refuse_remote_cluster(os.environ.get("RAY_ADDRESS"))
        for one in data.values() if isinstance(data, Mapping) else [data]:
            if one is not None:
                refuse_site_data(on_this_machine(one, where="data"), where="data")
        self.data = {name: data_folder(data, name) for name in names}
        root = (
            default_workspace() if workspace_root is None else on_this_machine(workspace_root, where="workspace_root")
        )
        self.workspace_root = root.absolute()
        refuse_kit(self.workspace_root, where="workspace_root")

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end. An interrupt ends its processes and is raised again."""
        if recipe.settings.min_clients > len(self.clients):
            raise RecipeUnusable(
                f"the recipe needs {recipe.settings.min_clients} clients, the simulation has {len(self.clients)}",
                where="min_clients",
            )
        refuse_kit(recipe.folder, where="train_script")
        _check_own_lock(recipe)
        started = datetime.now(UTC)
        job_id = self.resume or f"{recipe.name}-{started:%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"
        folder = self.workspace_root / job_id
        if self.resume is None:
            folder.mkdir(mode=0o700, parents=True)
        elif not folder.is_dir():
            raise RecipeUnusable(f"there is no run {job_id} in {self.workspace_root}", where="resume")
        simulation = _Simulation(self, recipe, job_id, folder, started)
        simulation.run()
        return Run(job_id, simulation)


class _Simulation:
    """One job of SimEnv; afterwards the handle of its Run."""

    def __init__(self, env: SimEnv, recipe: Recipe, job_id: str, folder: Path, started: datetime) -> None:
        self._env = env
        self._recipe = recipe
        self._folder = folder
        self._events: list[JobEvent] = []
        self._code, self._script = _code_of(recipe, folder)
        self.history = JobHistory(job_id, recipe.settings, started)

    def run(self) -> None:
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
                self._run_workflow(federation)
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

    def _run_workflow(self, federation: Federation) -> None:
        settings = self._recipe.settings
        preload = ["torch", *(["fl.environments.torch_optimizers"] if self._optimizers_wanted() else [])]
        preload = preload if settings.framework == "pytorch" else []
        with self._processes(preload) as processes:
            self._started = processes
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

    def _optimizers_wanted(self) -> bool:
        """Whether what torch imports at an optimizer's making is best imported once, for all clients."""
        if len(self._env.clients) > len(os.sched_getaffinity(0)):
            return True
        scripts = (self._code / path for path in self._recipe.settings.scripts)
        return any(b"optim" in script.read_bytes() for script in scripts if script.is_file())

    def _processes(self, preload: Sequence[str]) -> ClientProcesses | RayClients:
        if self._env.backend == "ray":
            from fl.environments.ray_clients import RayClients

            return RayClients(preload, threads=self._env.threads_each)
        return ClientProcesses(preload, threads=self._env.threads_each)

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


def client_names(clients: Sequence[str] | None, num_clients: int | None, *, most: int, where: str) -> list[str]:
    """The clients' names, given or counted. Raises RecipeUnusable."""
    if clients is None and num_clients is None:
        raise RecipeUnusable("give clients or num_clients", where=where)
    names = list(clients) if clients is not None else [f"site-{number + 1}" for number in range(num_clients or 0)]
    if num_clients is not None and num_clients != len(names):
        raise RecipeUnusable(f"num_clients is {num_clients}, but clients names {len(names)}", where=where)
    if not 1 <= len(names) <= most or len(set(names)) != len(names):
        raise RecipeUnusable(f"there must be 1 to {most} clients, each with its own name", where=where)
    for name in names:
        if not NAME.fullmatch(name):
            raise RecipeUnusable(f"client name {name!r} does not match {NAME_PATTERN}", where=where)
    return names


def gpus_of(names: Sequence[str], gpu_config: str | None) -> dict[str, str] | None:
    """Each client's CUDA_VISIBLE_DEVICES, the groups of `gpu_config` dealt in turn. Raises RecipeUnusable."""
    if gpu_config is None:
        return None
    text = gpu_config.replace(" ", "")
    if not GPUS.fullmatch(text):
        raise RecipeUnusable(
            f"gpu_config {gpu_config!r} is no list of GPUs", where="gpu_config", do='Write "0,1" or "[0,1],[2,3]".'
        )
    groups = [one.strip("[]") for one in re.findall(r"\[[\d,]+\]|\d+", text)]
    return {name: groups[number % len(groups)] for number, name in enumerate(names)}


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


def _check_own_lock(recipe: Recipe) -> None:
    """Raises RecipeUnusable where a lock that the author keeps is not what is installed; without one, all is well:
    code and packages are of this machine."""
    file = recipe.folder / LOCK_FILE
    content = recipe.added.get(LOCK_FILE) or (file.read_bytes() if file.is_file() else None)
    refuse_broken(own_lock(content), packages_here())


def _link_entries(folder: Path, code: Path) -> None:
    """Links to all that may be in a bundle, whatever else lies in the folder (the runs themselves, perhaps)."""
    code.mkdir(mode=0o700, exist_ok=True)
    for entry in folder.iterdir():
        link = code / entry.name
        if not entry.name.startswith(".") and entry.name != "__pycache__" and not link.is_symlink():
            link.symlink_to(entry)


def data_folder(data: str | Path | Mapping[str, str | Path] | None, name: str) -> Path | None:
    """The folder of a client's data. Raises RecipeUnusable if it is named and not there."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        if name not in data:
            raise RecipeUnusable(f"there is no data for client {name}", where="data")
        folder = Path(data[name])
    else:
        folder = Path(data) / name
    if not folder.is_dir():
        raise RecipeUnusable(f"{folder} is not a folder", where="data")
    return folder.resolve()


def default_workspace() -> Path:
    """Where runs keep their results unless told otherwise."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "sealwright" / "runs"
