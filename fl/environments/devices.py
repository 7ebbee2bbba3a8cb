"""SimEnv for edge jobs: simulated devices report to one gateway for each of the environment's clients.

The result has the layout of every job's (`fl.jobs.results`), and beside it `report.json` and `report.html`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fl.edge.branch import bounds_of
from fl.edge.contract import EdgeJob
from fl.edge.embedded import EmbeddedTree
from fl.edge.evaluating import examples_of
from fl.edge.fedbuff import FIRST_VERSION, FedBuff, Step
from fl.edge.judgement import Judgement
from fl.edge.settings import EvaluatorConfig
from fl.edge.simulation.engine import Evaluate, Simulation, Trace
from fl.edge.simulation.pool import TrainingPool
from fl.edge.simulation.population import Population, always_there
from fl.edge.simulation.report import document, page
from fl.environments.display import Display
from fl.environments.keeping_out import refuse_kit
from fl.errors import JobAborted, JobFailed, RecipeUnusable
from fl.guard.keystream import KEY_SIZE, Keystream
from fl.jobs.progress import JobEvent, Status, line_of
from fl.jobs.results import BEST_FILE, JOB_FILE, MODEL_FILE, JobHistory, write_file, write_json
from fl.jobs.settings import FedBuffOptions
from fl.run import Run
from fl.tracking import start_tracking
from fl.transport.memory import SealedMemory
from policies.errors import Refused, SealwrightError

if TYPE_CHECKING:
    from fl.edge.recipes import EdgeFedBuffRecipe
    from fl.environments.sim import SimEnv

MOMENT: Final = 1.0
"""Virtual seconds between two exchanges of the tree."""
BATCH: Final = 1024


def simulate_job(env: SimEnv, recipe: EdgeFedBuffRecipe) -> Run:
    """Run the job to its end. An interrupt ends its processes and is raised again. Raises RecipeUnusable."""
    if env.resume is not None or env.backend != "processes":
        raise RecipeUnusable("an edge job has the processes backend and is not resumed", where="SimEnv")
    refuse_kit(recipe.folder, where="train_script")
    started = datetime.now(UTC)
    job_id = f"{recipe.name}-{started:%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"
    folder = env.workspace_root / job_id
    job = _Job(env, recipe, job_id, folder, started)
    folder.mkdir(mode=0o700, parents=True)
    job.run()
    return Run(job_id, job)


class _Job:
    """One edge job of SimEnv; afterwards the handle of its Run."""

    def __init__(self, env: SimEnv, recipe: EdgeFedBuffRecipe, job_id: str, folder: Path, started: datetime) -> None:
        options, simulation = recipe.settings.options, recipe.simulation()
        if not isinstance(options, FedBuffOptions):
            raise TypeError("only an edge job has devices")
        self._env = env
        self._recipe = recipe
        self._edge = options.edge
        self._simulation = simulation
        self._processor = recipe.processor()
        self._evaluate = None if recipe.evaluator_config is None else evaluation(recipe, recipe.evaluator_config)
        devices = simulation.num_devices * len(env.clients)
        self._population = simulation.population or always_there(devices, median_seconds=5.0)
        self._folder = folder
        self._events: list[JobEvent] = []
        self._observers: list[Callable[[JobEvent], None]] = [self._events.append]
        self.history = JobHistory(job_id, recipe.settings, started)
        self._judgement = Judgement(recipe.settings.selection)

    def run(self) -> None:
        settings = self._recipe.settings
        tracking = start_tracking(settings, self._folder)
        self._observers.append(self.history.observe)
        if tracking is not None:
            self._observers.append(tracking.observe)
        if self._env.log_mode.lines:
            self._observers.append(_write_line)
        try:
            shown = not self._env.log_mode.lines
            with Display(settings.name, settings.num_rounds, sys.stderr, shown=shown) as display:
                self._observers.append(display.observe)
                self._train()
        except SealwrightError as error:
            reasons = error.reasons if isinstance(error, Refused) else (error.what,)
            self._end(Status.FAILED, reasons=reasons)
            sys.stderr.write(f"{error.what}\n")
        except BaseException as error:
            self._end(Status.ABORTED, reasons=(f"interrupted by {type(error).__name__}",))
            raise
        finally:
            if tracking is not None:
                tracking.close()

    def _train(self) -> None:
        settings, schema = self._recipe.settings, self._recipe.settings.schema_of_model
        workers = min(self._simulation.num_workers, self._env.at_once)
        noise = None if self._edge.privacy is None else Keystream(os.urandom(KEY_SIZE)).normal
        with TrainingPool(self._processor, schema, workers) as pool:
            generator = np.random.default_rng(self._population.seed)
            buff = FedBuff(schema, self._recipe.first_model(), self._edge, generator, noise)

            def tree(clock: Callable[[], float]) -> EmbeddedTree:
                return EmbeddedTree(
                    buff,
                    EdgeJob(
                        self.history.job_id,
                        settings.name,
                        "edge",
                        bounds=bounds_of(self._edge),
                        device_reuse=self._edge.devices.device_reuse,
                    ),
                    schema,
                    depth=1,
                    width=len(self._env.clients),
                    clock=clock,
                    task_seconds=self._edge.task_seconds,
                    strategy=self._edge.devices.device_sampling_strategy,
                    seed=self._population.seed,
                )

            evaluator = self._recipe.evaluator_config
            try:
                self._observe(JobEvent(kind="round", round=0))
                trace = Simulation(
                    self._edge,
                    Population(self._population),
                    pool,
                    buff,
                    tree,
                    moment=MOMENT,
                    evaluate=self._evaluate,
                    eval_frequency=1 if evaluator is None else evaluator.eval_frequency,
                    made=lambda step, accuracy: self._made(buff, step, accuracy),
                ).run(self._simulation.job_timeout)
                self._finish(buff, trace)
            finally:
                buff.close()

    def _made(self, buff: FedBuff, step: Step, accuracy: float | None) -> str | None:
        """A version is made: tell it, keep it if it is the best so far; why the job ends with it, if it does."""
        round_ = step.version - FIRST_VERSION - 1
        values = {"updates": float(step.updates)}
        if accuracy is not None:
            values["accuracy"] = accuracy
        self._observe(JobEvent(kind="aggregated", round=round_, values=values))
        if accuracy is not None and self._judgement.take(accuracy):
            write_file(self._folder / BEST_FILE, buff.models[step.version].view)
            self._observe(JobEvent(kind="best", round=round_, values={"accuracy": accuracy}))
        why = self._judgement.over
        if not buff.over and why is None:
            self._observe(JobEvent(kind="round", round=round_ + 1))
        return why

    def _finish(self, buff: FedBuff, trace: Trace) -> None:
        if not trace.versions:
            raise JobFailed(self.history.job_id, (f"no version was made: {trace.ended}",))
        model: SealedMemory = buff.models[buff.version]
        write_file(self._folder / MODEL_FILE, model.view)
        options = self._recipe.settings.options
        asked = {} if options is None else options.model_dump(mode="json")
        report = document(trace, {"name": self._recipe.name, **asked})
        write_json(self._folder / "report.json", report)
        write_file(self._folder / "report.html", page(report).encode())
        self._end(Status.FINISHED, reasons=(trace.ended,), model=model.digest)

    def _observe(self, event: JobEvent) -> None:
        for observer in self._observers:
            observer(event)

    def _end(self, status: Status, *, reasons: tuple[str, ...] = (), model: str | None = None) -> None:
        if not self.history.status.over:
            self.history.end(status, datetime.now(UTC), reasons=reasons, model=model)
            write_json(self._folder / JOB_FILE, self.history.document())

    # the handle of a Run

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
        return {}

    def watch(self, observe: Callable[[JobEvent], None]) -> Status:
        for event in self._events:
            observe(event)
        return self.history.status


def evaluation(recipe: EdgeFedBuffRecipe, evaluator: EvaluatorConfig) -> Evaluate:
    """What measures the accuracy of a version's parameters. Raises RecipeUnusable."""
    import torch

    inputs, labels = examples_of(evaluator)
    net = recipe.device_model.net

    def evaluate(parameters: Mapping[str, Any]) -> float:
        net.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in parameters.items()})
        net.eval()
        right = 0
        with torch.no_grad():
            for at in range(0, len(labels), BATCH):
                right += int((net(inputs[at : at + BATCH]).argmax(dim=1) == labels[at : at + BATCH]).sum())
        net.train()
        return right / len(labels)

    return evaluate


def _write_line(event: JobEvent) -> None:
    if line := line_of(event):
        sys.stderr.write(line + "\n")
