"""What evaluates an edge job's versions at its root: the bundle's graph and test data, in a sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Self

from fl.edge.evaluating import DATA_FILE, GRAPH_FILE, LOOP, LOOP_FILE, METRIC, is_accuracy
from fl.errors import JobFailed, ScriptFailed
from fl.guard.gate import max_update_size
from fl.guard.sandbox import Sandbox
from fl.jobs.bundle import Bundle
from fl.site.script import END_SECONDS, ScriptSession
from fl.transport.local import ScriptSocket
from fl.transport.memory import SealedMemory

NAME: Final = "evaluator"
SECONDS: Final = 600.0
"""How long one evaluation may take."""
REPORT_SECONDS: Final = 5.0


class SandboxedEvaluator:
    """One job's (`fl.edge.root.Evaluator`). A context: leaving it ends the sandbox."""

    metric = METRIC

    def __init__(self, bundle: Bundle, job: str, frequency: int, keep_best: Callable[[SealedMemory], None]) -> None:
        """Raises SandboxFailed, SandboxUnusable, ScriptFailed; JobFailed for a bundle without what it takes."""
        missing = [name for name in (GRAPH_FILE, DATA_FILE) if name not in bundle.files]
        if missing:
            raise JobFailed(job, (f"the bundle has no {missing[0]}, with which versions are evaluated",))
        self.frequency = frequency
        self.keep_best = keep_best
        self._job = job
        self._number = 0
        files = {LOOP_FILE: LOOP, **{name: bundle.files[name] for name in (GRAPH_FILE, DATA_FILE)}}
        ours, theirs = ScriptSocket.pair()
        with theirs:
            self._process = Sandbox(files, LOOP_FILE).start(theirs)
        self._session = ScriptSession(ours, site=NAME, how_it_ended=self._how_it_ended)
        # The loop has the whole model, whatever devices send, and filters are for devices' scripts.
        settings = bundle.settings.model_copy(update={"params_type": "FULL"})
        self._session.greet(job, settings, data=None, max_update=max_update_size(settings.schema_of_model))

    def measure(self, model: SealedMemory) -> float:
        """A version's accuracy. Raises JobFailed if the sandbox fails."""
        number, self._number = self._number, self._number + 1
        try:
            answer, memory = self._session.train(
                number, number + 1, model, seconds=SECONDS, value=lambda *_: None, task="evaluate"
            )
        except ScriptFailed as error:
            raise JobFailed(self._job, (error.told,)) from error
        memory.close()
        value = answer.metrics.get(METRIC)
        if value is None or not is_accuracy(value):
            raise JobFailed(self._job, (f"the evaluator answered {value!r}, which is no accuracy",))
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        with self._process:
            self._session.end()
            self._session.close()
            self._process.wait(END_SECONDS)

    def _how_it_ended(self) -> str:
        outcome = self._process.wait(REPORT_SECONDS)
        return "closed its connection to the job" if outcome is None else outcome.sentence
