"""What happens in a job, as events: for the live display, tracking, `seal job watch` and the job's record."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def one_line(text: str) -> str:
    """`text` without anything that a terminal could take for more than letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


Line: TypeAlias = Annotated[str, Field(max_length=2000), AfterValidator(one_line)]
"""A sentence that someone else wrote and that people will read in a terminal."""


class Status(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self in {Status.FINISHED, Status.FAILED, Status.ABORTED}


class JobEvent(BaseModel):
    """One thing that happened in a job.

    `joined`, `lost`, `refused`, `paused`, `resumed` and `update` name a `site`; `round` begins and `aggregated` ends
    one (from 0); `best` says that the model which the sites received in a round is the best so far; `evaluated` tells a
    `site`'s metrics of the model that `text` names; `value` is a number, `line` is text that a script
    logged; `status` tells the job's new status in `text`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal[
        "status", "joined", "lost", "refused", "paused", "resumed", "round", "update", "aggregated", "value", "best",
        "evaluated", "line",
    ]  # fmt: skip
    site: str | None = None
    round: int | None = None
    weight: float | None = None
    values: Annotated[dict[Line, float], Field(max_length=256)] = {}
    text: Line = ""


def line_of(event: JobEvent) -> str:
    """An event as one line of plain text; empty for values that scripts log."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in list(event.values.items())[:6])
    round_ = "" if event.round is None else f"round {event.round + 1}"
    return {
        "status": f"the job is {event.text}",
        "joined": f"{event.site} has joined",
        "lost": f"{event.site} is lost: {event.text}",
        "refused": f"{event.site} is refused: {event.text}",
        "paused": f"{event.site} pauses: {event.text}",
        "resumed": f"{event.site} goes on",
        "round": f"{round_} begins",
        "update": f"{round_}: {event.site} sent its update {values}".rstrip(),
        "aggregated": f"{round_} is done: {values or 'no metrics'}",
        "best": f"{round_}: the sites received the best model so far, {values}",
        "line": f"{event.site}: {event.text}",
        "evaluated": f"{event.site} has evaluated the model of {event.text}: {values or 'no metrics'}",
    }.get(event.kind, "")
