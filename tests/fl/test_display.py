"""A job's progress in a terminal: nothing where there is none, and no word of a site's can steer it."""

from __future__ import annotations

import io

from fl.environments.display import Display
from fl.jobs.progress import JobEvent, line_of

EVENTS = [
    JobEvent(kind="status", text="running"),
    JobEvent(kind="joined", site="cygnus-bio"),
    JobEvent(kind="round", round=0),
    JobEvent(kind="update", site="cygnus-bio", round=0, weight=1.0, values={"loss": 0.25}),
    JobEvent(kind="aggregated", round=0, values={"[red]loss": 0.25}),
    JobEvent(kind="refused", site="cygnus-bio", text="[link=http://x]\x1b]0;owned\x07"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_it_is_silent() -> None:
    stream = io.StringIO()
    with Display("trial", 2, stream) as display:
        for event in EVENTS:
            display.observe(event)
        assert not display.live
    assert stream.getvalue() == ""


def test_in_a_terminal_it_shows_rounds_metrics_and_sites() -> None:
    stream = Terminal()
    with Display("trial", 2, stream) as display:
        for event in EVENTS[:-1]:
            display.observe(event)
        display.observe(JobEvent(kind="round", round=1))
        display.observe(EVENTS[-1])
    shown = stream.getvalue()
    assert "[red]loss 0.25" in shown
    assert "1 of 2" in shown
    assert "[link=http://x]?]0;owned?" in shown
    assert "owned\x07" not in shown


def test_lines_for_those_who_read_a_log() -> None:
    assert [line_of(event) for event in EVENTS] == [
        "the job is running",
        "cygnus-bio has joined",
        "round 1 begins",
        "round 1: cygnus-bio sent its update loss 0.25",
        "round 1 is done: [red]loss 0.25",
        "cygnus-bio is refused: [link=http://x]?]0;owned?",
    ]
    assert line_of(JobEvent(kind="value", site="cygnus-bio", round=0, values={"x": 1.0})) == ""
