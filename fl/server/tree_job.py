"""An edge job at the server: the root of its tree, from the first version to the last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fl.edge.root import Evaluator, RootJob
from fl.edge.task import DeviceTask
from fl.edge.tree_frames import Offer
from fl.errors import JobAborted, JobFailed
from fl.guard.keystream import KEY_SIZE, Keystream
from fl.jobs.bundle import Bundle
from fl.jobs.progress import JobEvent
from fl.jobs.settings import FedBuffOptions
from fl.server.evaluator import SandboxedEvaluator
from fl.server.task import Keeper
from fl.transport.memory import SealedMemory

LOOK_SECONDS: Final = 0.5
"""Between two looks whether the job was stopped."""


def root_of(
    job: str,
    record: str,
    bundle: Bundle,
    model: SealedMemory,
    observe: Callable[[JobEvent], None],
    keeper: Keeper | None = None,
    evaluator: Evaluator | None = None,
) -> RootJob:
    """The root of an edge job's tree, which takes `model`. `record`: the signed record; `keeper`: keeps each version.

    Raises ValueError; SealedDataRefused for a kept version that does not fit.
    """
    settings, options = bundle.settings, bundle.settings.options
    if not isinstance(options, FedBuffOptions):
        raise ValueError("only an edge job has a tree")
    task = DeviceTask.of(bundle)
    noise = None if options.edge.privacy is None else Keystream(os.urandom(KEY_SIZE)).normal
    offer = Offer(job=job, record=record, bundle=bundle.digest, bundle_size=len(bundle.raw))
    return RootJob(
        offer,
        bundle.raw,
        settings.schema_of_model,
        model,
        options.edge,
        task.digest,
        observe,
        noise,
        keeper=keeper,
        evaluator=evaluator,
        selection=settings.selection,
    )


@contextmanager
def evaluating(bundle: Bundle, job: str, keep_best: Callable[[SealedMemory], None]) -> Iterator[Evaluator | None]:
    """What evaluates the versions of an edge job, while the block runs; None if its author asks for none."""
    options = bundle.settings.options
    every = options.edge.eval_frequency if isinstance(options, FedBuffOptions) else None
    if every is None:
        yield None
        return
    with SandboxedEvaluator(bundle, job, every, keep_best) as evaluator:
        yield evaluator


def run_root(root: RootJob, stopped_by: Callable[[], str | None]) -> SealedMemory:
    """Wait for the last version; the newest model, the caller's to close. `stopped_by`: who has stopped the job.

    Raises JobAborted; JobFailed if no device asks for `device_wait_timeout` before a version was made; what observing
    has raised.
    """
    job = root.offer.job
    root.begin()
    while not root.wait(LOOK_SECONDS):
        by = stopped_by()
        if by is not None:
            raise JobAborted(job, by)
        why = root.why_stopped()
        if why is not None:
            if not root.made:
                raise JobFailed(job, (why,))
            break
    return root.result()
