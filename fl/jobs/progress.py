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
    one (from 0); `value` is a number that a script logged; `status` tells the job's new status in `text`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal["status", "joined", "lost", "refused", "paused", "resumed", "round", "update", "aggregated", "value"]
    site: str | None = None
    round: int | None = None
    weight: float | None = None
    values: Annotated[dict[Line, float], Field(max_length=256)] = {}
    text: Line = ""
