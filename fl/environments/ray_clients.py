"""Simulated clients as actors of a Ray cluster, one for each; their scripts are processes beside their actors.

Ray is the author's own cluster, as it is found: a running one (`RAY_ADDRESS`, or `ray start` on this machine), or one
that is started for the simulation. What is between driver and actors is Ray's to protect. Data folders are read where
the actor runs, under the same path.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from fl.errors import MalformedMessage, RecipeUnusable, ScriptFailed
from fl.jobs.settings import JobSettings, TaskKind
from fl.transport.local import Answer, FoldedUpdate
from fl.transport.memory import SealedMemory

START_SECONDS: Final = 120.0
"""How long Ray may take to give a client its place."""
MAX_CODE: Final = 64 << 20


class RayClients:
    """The actors of one simulation. Leaving the context ends them all."""

    def __init__(self, preload: Sequence[str], *, threads: int) -> None:
        """Raises RecipeUnusable if Ray is not installed or cannot be had."""
        try:
            import ray
        except ImportError as error:
            raise RecipeUnusable(
                "Ray is not installed", where="backend", do="pip install 'sealwright[ray]', or leave backend out."
            ) from error
        self._ray = ray
        self._preload = list(preload)
        self._threads = threads
        self._own = not ray.is_initialized()
        self._sessions: list[RaySession] = []
        if self._own:
            try:
                ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RecipeUnusable(f"Ray cannot be had: {str(error)[:300]}", where="backend") from error

    def session(
        self,
        name: str,
        *,
        folder: Path,
        script: str,
        arguments: Sequence[str],
        work: Path,
        environment: Mapping[str, str] | None = None,
        log_config: Mapping[str, Any] | None = None,
    ) -> RaySession:
        """Start a client somewhere in the cluster; the conversation with its script."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }
        if sum(map(len, files.values())) > MAX_CODE:
            raise RecipeUnusable(f"the recipe's folder has more than {MAX_CODE} bytes", where=str(folder))
        actor = (
            self._ray.remote(_Client)
            .options(num_cpus=self._threads, max_concurrency=2)
            .remote(
                self._preload, self._threads, name, files, script, list(arguments), dict(environment or {}), log_config
            )
        )
        session = RaySession(self._ray, actor, name, work / "log.txt")
        self._sessions.append(session)
        return session

    def wait_for_exits(self, seconds: float) -> None:
        """Wait until every client's log is here, `seconds` at most."""
        deadline = time.monotonic() + seconds
        for session in self._sessions:
            session.collect(max(0.1, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self._sessions:
            self._ray.kill(session.actor)
        if self._own:
            self._ray.shutdown()


class RaySession:
    """A script in an actor, as `fl.site.script.ScriptSession` is one on this machine."""

    def __init__(self, ray: Any, actor: Any, site: str, log: Path) -> None:
        self.actor = actor
        self._ray = ray
        self._site = site
        self._log = log
        self._over = threading.Event()

    def greet(self, job_id: str, settings: JobSettings, *, data: str | None, max_update: int) -> None:
        """Tell the script who and where it is."""
        self._asked("greet", job_id, settings.model_dump_json(), data, max_update, seconds=START_SECONDS)

    def train(
        self,
        round_: int,
        total: int,
        model: SealedMemory,
        *,
        seconds: float,
        value: Callable[[str, float, int], None],
        line: Callable[[str], None] | None = None,
        task: TaskKind = "train",
        update: FoldedUpdate | None = None,
    ) -> tuple[Answer, SealedMemory]:
        """Give the script a task; its answer and tensors, the caller's to close. Raises ScriptFailed.

        What the script logs comes with its answer.
        """
        if update is not None:
            raise RecipeUnusable("an aggregator runs beside the server", where="backend")
        raw = bytes(model.view)
        answer, tensors, values = self._asked("train", round_, total, raw, seconds, task, seconds=seconds + 30)
        for key, number, step in values:
            value(key, number, step)
        return Answer.model_validate_json(answer), SealedMemory.of(tensors)

    def end(self) -> None:
        """Tell the script that the job is over."""
        if not self._over.is_set():
            self._over.set()
            self.actor.end.remote()

    def close(self) -> None:
        """Nothing is held here; the actor ends with its simulation."""

    def collect(self, seconds: float) -> None:
        """Write the script's log into the simulation's folder."""
        try:
            text = self._ray.get(self.actor.finished.remote(), timeout=seconds)
        except self._ray.exceptions.RayError:
            return  # the actor is gone, which its client's loss has told
        if text:
            self._log.write_bytes(text)

    def _asked(self, method: str, *arguments: Any, seconds: float) -> Any:
        try:
            done, found = self._ray.get(getattr(self.actor, method).remote(*arguments), timeout=seconds)
        except self._ray.exceptions.RayError as error:
            raise ScriptFailed(self._site, f"is lost with its actor: {type(error).__name__}") from error
        if not done:
            raise ScriptFailed(self._site, found)
        return found


class _Client:
    """The actor: a folder with the recipe's code, and the script's process in it."""

    def __init__(
        self,
        preload: list[str],
        threads: int,
        name: str,
        files: dict[str, bytes],
        script: str,
        arguments: list[str],
        environment: dict[str, str],
        log_config: dict[str, Any] | None,
    ) -> None:
        from fl.environments.clients import ClientProcesses

        self._folder = tempfile.TemporaryDirectory(prefix="sealwright-")
        code, self._work = Path(self._folder.name) / "code", Path(self._folder.name) / "work"
        self._work.mkdir()
        for path, content in files.items():
            (code / path).parent.mkdir(parents=True, exist_ok=True)
            (code / path).write_bytes(content)
        self._site = name
        self._processes = ClientProcesses(preload, threads=threads)
        self._session = self._processes.session(
            name,
            folder=code,
            script=script,
            arguments=arguments,
            work=self._work,
            environment=environment,
            log_config=log_config,
        )

    def greet(self, job_id: str, settings: str, data: str | None, max_update: int) -> tuple[bool, Any]:
        return self._tried(
            lambda: self._session.greet(
                job_id, JobSettings.model_validate_json(settings), data=data, max_update=max_update
            )
        )

    def train(self, round_: int, total: int, model: bytes, seconds: float, task: TaskKind) -> tuple[bool, Any]:
        values: list[tuple[str, float, int]] = []

        def train() -> tuple[str, bytes, list[tuple[str, float, int]]]:
            with SealedMemory.of(model) as memory:
                answer, update = self._session.train(
                    round_, total, memory, seconds=seconds, value=lambda *logged: values.append(logged), task=task
                )
            with update:
                return answer.model_dump_json(), bytes(update.view), values

        return self._tried(train)

    def end(self) -> None:
        self._session.end()

    def finished(self) -> bytes:
        """Wait for the script's end; its log."""
        self._processes.wait_for_exits(30.0)
        log = self._work / "log.txt"
        return log.read_bytes() if log.exists() else b""

    def _tried(self, action: Callable[[], Any]) -> tuple[bool, Any]:
        """An error of ours does not travel by pickle: its sentence does."""
        try:
            return True, action()
        except ScriptFailed as failure:
            return False, failure.what.removeprefix(f"the training script of {self._site} ")
        except MalformedMessage as failure:
            return False, failure.what
