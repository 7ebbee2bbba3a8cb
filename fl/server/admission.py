"""The whole check of one site's update as it comes to the server, before an algorithm sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fl.aggregation.deltas import Delta
from fl.errors import MalformedTensors, UpdateRefused
from fl.guard.gate import admit_update
from fl.model import MAX_WEIGHT, ParamsType, check_metrics
from fl.server.task import Task
from fl.tensors import Schema, TensorFile
from fl.transport.stored import Stored


def admitted(
    site: str,
    task: Task,
    memory: Stored,
    *,
    schema: Schema,
    job_type: ParamsType,
    delta: Delta | None,
    params_type: ParamsType,
    weight: float,
    metrics: Mapping[str, float],
) -> tuple[TensorFile, dict[str, float]]:
    """The tensors of an update and its metrics. `schema`, `job_type`, `delta`: what the job's updates are.

    Raises UpdateRefused with every reason, SpoolFailed.
    """
    reasons = tuple(_reasons(task, job_type, params_type, weight))
    if reasons:
        raise UpdateRefused(site, reasons)
    try:
        checked = check_metrics(metrics)
        wanted: Schema = {} if task.kind == "evaluate" else schema
        return admit_update(memory.source, wanted, site=site, delta=delta if task.kind == "train" else None), checked
    except MalformedTensors as error:
        raise UpdateRefused(site, (error.what,)) from error


def _reasons(task: Task, job_type: ParamsType, params_type: ParamsType, weight: float) -> Iterator[str]:
    wanted = ParamsType.FULL if task.kind == "submit_model" else job_type
    if params_type is not wanted:
        yield f"its parameters are {params_type}, the job's are {wanted}"
    if not 0 < weight <= MAX_WEIGHT:
        yield f"its weight {weight} is not above 0 and at most {MAX_WEIGHT:.0f}"
