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
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from fl.environments.clients import ClientProcesses
from fl.environments.display import Display
from fl.errors import JobAborted, JobFailed, OutputRefused, RecipeUnusable, ScriptFailed, UpdateRefused
from fl.guard.disclosure import LoggedNumbers, disclose
from fl.guard.gate import max_update_size
from fl.jobs.progress import JobEvent, Status
from fl.jobs.results import JOB_FILE, MODEL_FILE, JobHistory, write_file, write_json
from fl.jobs.settings import NAME_PATTERN, JobSettings
from fl.local.dp_sgd import what_runs
from fl.model import ParamsType
from fl.run import Run
from fl.server.federation import Federation, Task
from fl.server.workflows import WORKFLOWS
from fl.site.script import END_SECONDS, ScriptSession

if TYPE_CHECKING:
    from fl.recipes.recipe import Recipe

MAX_CLIENTS: Final = 10_000
NAME: Final = re.compile(NAME_PATTERN)


class SimEnv:
    """Simulate a federation with one process per client."""

    def __init__(
        self,
        clients: Sequence[str] | None = None,
        num_clients: int | None = None,
        *,
        num_threads: int | None = None,
        data: str | Path | Mapping[str, str | Path] | None = None,
        workspace_root: str | Path | None = None,
    ) -> None:
        """Arguments:

        - `clients` or `num_clients`: the clients' names, or how many (then `site-1`, `site-2`, ...).
        - `num_threads`: how many clients train at the same time (default: the machine's cores).
        - `data`: what `flare.data_path` finds: a folder with one subfolder per client, or a folder for each client.
        - `workspace_root`: where results go (default: `~/.local/share/sealwright/runs`).

        Raises RecipeUnusable with the argument that is wrong.
        """
        if clients is None and num_clients is None:
            raise RecipeUnusable("give clients or num_clients", where="SimEnv")
        names = list(clients) if clients is not None else [f"site-{number + 1}" for number in range(num_clients or 0)]
        if num_clients is not None and num_clients != len(names):
            raise RecipeUnusable(f"num_clients is {num_clients}, but clients names {len(names)}", where="SimEnv")
        if not 1 <= len(names) <= MAX_CLIENTS or len(set(names)) != len(names):
            raise RecipeUnusable(f"there must be 1 to {MAX_CLIENTS} clients, each with its own name", where="SimEnv")
        for name in names:
            if not NAME.fullmatch(name):
                raise RecipeUnusable(f"client name {name!r} does not match {NAME_PATTERN}", where="SimEnv")
        cores = len(os.sched_getaffinity(0))
        self.clients = names
        self.at_once = max(1, num_threads if num_threads is not None else cores)
        self.threads_each = max(1, cores // min(self.at_once, len(names)))
        self.data = {name: _data_folder(data, name) for name in names}
        self.workspace_root = (Path(workspace_root) if workspace_root is not None else default_workspace()).absolute()

    def execute(self, recipe: Recipe) -> Run:
        """Run the job to its end. An interrupt ends its processes and is raised again."""
        if recipe.settings.min_clients > len(self.clients):
            raise RecipeUnusable(
                f"the recipe needs {recipe.settings.min_clients} clients, the simulation has {len(self.clients)}",
                where="min_clients",
            )
        started = datetime.now(UTC)
        job_id = f"{recipe.name}-{started:%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"
        folder = self.workspace_root / job_id
        folder.mkdir(mode=0o700, parents=True)
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
        tracking = None
        if settings.tracking == "tensorboard":
            from fl.tracking.tensorboard import TensorBoardTracking

            tracking = TensorBoardTracking(self._folder / "events")
            observers.append(tracking.observe)
        lock = threading.Lock()

        def observe(event: JobEvent) -> None:
            with lock:
                for observer in observers:
                    observer(event)

        federation = Federation(
            self.history.job_id,
            settings.schema_of_model,
            ParamsType(settings.params_type),
            min_sites=settings.min_clients,
            round_seconds=settings.round_seconds,
            observe=observe,
            at_once=self._env.at_once,
        )
        try:
            with Display(settings.name, settings.num_rounds, sys.stderr) as display:
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
            if tracking is not None:
                tracking.close()

    def _run_workflow(self, federation: Federation) -> None:
        settings = self._recipe.settings
        preload = ["torch"] if settings.framework == "pytorch" else []
        with ClientProcesses(preload, threads=self._env.threads_each) as processes:
            clients = [self._start_client(name, processes, federation) for name in self._env.clients]
            try:
                with self._recipe.first_model() as first:
                    result = WORKFLOWS[settings.recipe](federation, settings, first)
                with result:
                    write_file(self._folder / MODEL_FILE, result.view)
                    self._end(Status.FINISHED, model=result.digest)
            finally:
                federation.finish("the job is over")
                for client in clients:
                    client.stop()
            processes.wait_for_exits(END_SECONDS)  # after a failure nobody is waited for: leaving ends them all

    def _start_client(self, name: str, processes: ClientProcesses, federation: Federation) -> _Client:
        work = self._folder / name
        work.mkdir(mode=0o700)
        sock = processes.start(
            name,
            folder=self._code,
            script=self._script,
            arguments=self._recipe.settings.train_args,
            work=work,
        )
        session = ScriptSession(sock, site=name, how_it_ended=lambda: processes.how_it_ended(name))
        data = self._env.data[name]
        client = _Client(name, session, federation, self._recipe.settings)
        session.greet(
            self.history.job_id,
            self._recipe.settings,
            data=None if data is None else str(data),
            max_update=max_update_size(federation.schema),
        )
        federation.join(client)
        client.start()
        return client

    def _end(self, status: Status, *, reasons: tuple[str, ...] = (), model: str | None = None) -> None:
        if not self.history.status.over:
            self.history.end(status, datetime.now(UTC), reasons=reasons, model=model)
            write_json(self._folder / JOB_FILE, self.history.document())

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

    def watch(self, observe: Callable[[JobEvent], None]) -> Status:
        for event in self._events:
            observe(event)
        return self.history.status


class _Client:
    """A simulated client: a thread that carries tasks to its script and updates back."""

    def __init__(self, name: str, session: ScriptSession, federation: Federation, settings: JobSettings) -> None:
        self.name = name
        self._session = session
        self._federation = federation
        self._settings = settings
        self._logged = LoggedNumbers(settings.outputs, name)
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._carry, name=f"client {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def give(self, task: Task) -> None:
        self._tasks.put(task)

    def end(self, why: str) -> None:  # a script learns that the job is over, not why
        self._tasks.put(None)

    def stop(self) -> None:
        self._tasks.put(None)

    def _carry(self) -> None:
        federation = self._federation
        try:
            while (task := self._tasks.get()) is not None:
                self._logged.begin_round()
                answer, memory = self._session.train(
                    task.round,
                    task.total_rounds,
                    task.model,
                    seconds=federation.round_seconds,
                    value=self._log,
                )
                with memory:
                    shown = disclose(
                        memory,
                        params_type=answer.params_type,
                        weight=answer.weight,
                        metrics=answer.metrics,
                        model=task.model,
                        settings=self._settings,
                        site=self.name,
                    )
                federation.submit(
                    self.name,
                    answer.round,
                    shown.memory,
                    params_type=ParamsType(answer.params_type),
                    weight=shown.weight,
                    metrics=shown.metrics,
                )
        except UpdateRefused:
            pass  # the federation has noted it and put the client out of the job
        except OutputRefused as refusal:
            federation.lose(self.name, "; ".join(refusal.reasons), kind="refused")
        except ScriptFailed as failure:
            federation.lose(self.name, failure.what)
        finally:
            self._session.end()
            self._session.close()

    def _log(self, key: str, value: float, step: int) -> None:
        self._federation.value(self.name, key, self._logged.disclosed(key, value), step)


def _code_of(recipe: Recipe, folder: Path) -> tuple[Path, str]:
    """The folder of what each client runs, and the script in it: the recipe's own, or the trusted loop's."""
    settings = recipe.settings
    if settings.privacy is None:
        return recipe.folder, settings.train_script
    graph = (recipe.folder / settings.train_script).read_bytes()
    files, script = what_runs({settings.train_script: graph}, settings, settings.train_script)
    code = folder / "loop"
    code.mkdir(mode=0o700)
    for name, content in files.items():
        write_file(code / name, content)
    return code, script


def _data_folder(data: str | Path | Mapping[str, str | Path] | None, name: str) -> Path | None:
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
