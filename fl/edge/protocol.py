"""The device protocol's state table: which status may answer which message, and where a device then is.

One table drives the generated reference page (docs/reference/device-protocol.md), the gateway, which answers nothing
that is not in it, and the property tests of every kit. The messages are in `fl.edge.messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

Message = Literal["job", "task", "selection", "result", "mask"]
Status = Literal["OK", "RETRY", "NO_TASK", "NO_JOB", "DONE", "ERROR", "INVALID_REQUEST"]
State = Literal["idle", "joined", "training", "reporting", "masking", "over"]

MESSAGES: Final[tuple[Message, ...]] = get_args(Message)
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
STATES: Final[Mapping[State, str]] = MappingProxyType(
    {
        "idle": "has no job",
        "joined": "has a job and no task",
        "training": "has a task and runs it",
        "reporting": "has a result that no gateway has acknowledged",
        "masking": "has a result that is summed under masks, and is in a cohort or looks for one",
        "over": "asks no more",
    }
)


@dataclass(frozen=True, slots=True)
class Rule:
    """In `state` a device sends `message`; `status` says that `when`, and leads it to `then`.

    `waits`: it waits before its next message, as long as the answer says.
    """

    state: State
    message: Message
    status: Status
    then: State
    waits: bool
    when: str


TABLE: Final[tuple[Rule, ...]] = (
    Rule("idle", "job", "OK", "joined", False, "there is a job for this device"),
    Rule("idle", "job", "RETRY", "idle", True, "the gateway has no room now"),
    Rule("idle", "job", "NO_JOB", "idle", True, "no job's name and demands match the device's"),
    Rule("idle", "job", "DONE", "over", False, "every job that matches is over"),
    Rule("idle", "job", "ERROR", "idle", True, "the gateway failed"),
    Rule("idle", "job", "INVALID_REQUEST", "over", False, "the token or the request is refused; the message says why"),
    Rule("joined", "task", "OK", "training", False, "the device is to train the version in the answer"),
    Rule("joined", "task", "RETRY", "joined", True, "the device is not wanted now"),
    Rule("joined", "task", "NO_TASK", "joined", True, "there is no version to train yet"),
    Rule("joined", "task", "NO_JOB", "idle", True, "this gateway does not have the job any more"),
    Rule("joined", "task", "DONE", "idle", True, "the job is over"),
    Rule("joined", "task", "ERROR", "joined", True, "the gateway failed"),
    Rule("joined", "task", "INVALID_REQUEST", "over", False, "the token or the request is refused"),
    Rule("training", "selection", "OK", "training", False, "the device's version is still trained: go on"),
    Rule("training", "selection", "NO_TASK", "joined", False, "its version is trained no more: drop the task"),
    Rule("training", "selection", "NO_JOB", "idle", True, "this gateway does not have the job any more"),
    Rule("training", "selection", "DONE", "idle", True, "the job is over"),
    Rule("training", "selection", "ERROR", "training", True, "the gateway failed"),
    Rule("training", "selection", "INVALID_REQUEST", "joined", False, "the request is refused: drop the task"),
    Rule("reporting", "result", "OK", "joined", False, "the result is counted, now or before"),
    Rule("reporting", "result", "RETRY", "reporting", True, "the gateway has no room now: send the same again"),
    Rule("reporting", "result", "NO_TASK", "joined", False, "its version is trained no more: drop the result"),
    Rule("reporting", "result", "NO_JOB", "idle", True, "this gateway does not have the job any more"),
    Rule("reporting", "result", "DONE", "idle", True, "the job is over"),
    Rule("reporting", "result", "ERROR", "reporting", True, "the gateway failed: send the same again"),
    Rule("reporting", "result", "INVALID_REQUEST", "joined", True, "the result is refused: drop it"),
    Rule("masking", "mask", "OK", "masking", False, "the cohort goes on to the step in the answer"),
    Rule("masking", "mask", "RETRY", "masking", True, "others have still to take this step: send the same again"),
    Rule("masking", "mask", "NO_TASK", "joined", False, "the sum is made, or there will be none: drop the result"),
    Rule("masking", "mask", "NO_JOB", "idle", True, "this gateway does not have the job any more"),
    Rule("masking", "mask", "DONE", "idle", True, "the job is over"),
    Rule("masking", "mask", "ERROR", "masking", True, "the gateway failed: send the same again"),
    Rule("masking", "mask", "INVALID_REQUEST", "joined", True, "what the device says is refused: drop the result"),
)

SENDS: Final[Mapping[State, Message]] = MappingProxyType({rule.state: rule.message for rule in TABLE})
"""What a device sends in each state; `over` sends nothing."""
RULES: Final[Mapping[tuple[Message, Status], Rule]] = MappingProxyType({(r.message, r.status): r for r in TABLE})
"""Each message is sent in one state, so that a message and its answer's status say the rest."""

TRAINED: Final[State] = "reporting"
"""Where a device goes from `training` when its task has a result,"""
MASKED: Final[State] = "masking"
"""where instead if its task's results are masked,"""
GAVE_UP: Final[State] = "joined"
"""and where when it has none: the task failed, was not approved, or a condition (battery, network) ended it."""
RULED_OUT: Final[Mapping[Message, tuple[Status, ...]]] = MappingProxyType(
    {message: tuple(status for status in STATUSES if (message, status) not in RULES) for message in MESSAGES}
)
"""The statuses that never answer a message: a device takes one for ERROR."""


def next_state(message: Message, status: Status) -> Rule:
    """The rule of an answer; a status that may not answer `message` counts as ERROR."""
    return RULES.get((message, status)) or RULES[message, "ERROR"]
