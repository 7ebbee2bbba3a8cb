"""Commands in the ledger: bounded for each user whatever it does, nothing silently left out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl.errors import CommandRefused, PeerLost
from fl.guard.command_log import BURST, MAX_WINDOWS, REFILL_SECONDS, WINDOW_SECONDS, CommandLog

REFUSAL = CommandRefused("abort", "a/b", ("no right",))


class Ledger:
    """What was written down, and a clock that a test turns."""

    def __init__(self) -> None:
        self.entries: list[Mapping[str, Any]] = []
        self.now = 0.0
        self.told: list[str] = []
        self.log = CommandLog(self.record, self.told.append, {"server": "hub"}, clock=lambda: self.now)

    def record(self, kind: str, document: Mapping[str, Any]) -> str:
        assert kind == "command"
        self.entries.append(document)
        return ""


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("a/b", "c/d")),
        st.sampled_from(("abort", "download", "list", "report", "watch")),
        st.sampled_from(("j1", "j2", None)),
        st.booleans(),
        st.floats(0, 30),
    ),
    max_size=400,
)


@given(STEPS)
def test_entries_are_bounded_and_every_command_is_accounted_for(steps: list[Any]) -> None:
    ledger = Ledger()
    given_: dict[str, int] = {}
    for user, command, job, allowed, pause in steps:
        ledger.now += pause
        given_[user] = given_.get(user, 0) + 1
        if allowed:
            with suppress(CommandRefused):
                ledger.log.accepted(user, command, job, "token")
        else:
            ledger.log.refused(user, command, job, REFUSAL)
    for user, count in given_.items():
        entries = [entry for entry in ledger.entries if entry["user"] == user]
        assert len(entries) <= BURST + ledger.now / REFILL_SECONDS
        told = sum(entry.get("repeated", 0) + entry.get("unrecorded", 0) for entry in entries)
        own = ledger.log._allowances[user]
        assert len(entries) + told + own.repeated + own.unrecorded == count


def test_looking_on_is_written_down_once_a_window() -> None:
    ledger = Ledger()
    for _ in range(10):
        ledger.log.accepted("a/b", "report", "j", "token")
    assert len(ledger.entries) == 1
    ledger.now = WINDOW_SECONDS
    ledger.log.accepted("a/b", "report", "j", "token")
    assert ledger.entries[1]["repeated"] == 9
    ledger.log.accepted("a/b", "report", "other", "token")
    ledger.log.accepted("c/d", "report", "j", "token")
    assert len(ledger.entries) == 4


def test_who_is_no_user_shares_one_allowance_and_leaves_users_theirs() -> None:
    ledger = Ledger()
    for number in range(2 * BURST):
        ledger.log.refused(None, "list", f"j{number}", REFUSAL)
    assert len(ledger.entries) == BURST
    ledger.log.accepted("a/b", "abort", "j", "token")
    assert ledger.entries[-1]["user"] == "a/b"


def test_what_has_an_effect_is_refused_without_allowance() -> None:
    ledger = Ledger()
    for number in range(BURST):
        ledger.log.accepted("a/b", "abort", f"j{number}", "token")
    with pytest.raises(CommandRefused, match="more commands than the ledger takes"):
        ledger.log.accepted("a/b", "abort", "j", "token")
    ledger.now += REFILL_SECONDS
    ledger.log.accepted("a/b", "abort", "j", "token")
    assert ledger.entries[-1]["unrecorded"] == 1


def test_memory_is_bounded_whatever_is_looked_on() -> None:
    ledger = Ledger()
    for number in range(3 * MAX_WINDOWS):
        ledger.now += REFILL_SECONDS
        ledger.log.accepted("a/b", "report", f"j{number}", "token")
    assert len(ledger.log._allowances["a/b"].looked) <= MAX_WINDOWS


def test_a_ledger_that_fails_stops_what_is_accepted_and_not_what_is_refused() -> None:
    told: list[str] = []

    def fails(kind: str, document: Mapping[str, Any]) -> str:
        raise PeerLost("no broker", where="ledger")

    log = CommandLog(fails, told.append, {"site": "s"})
    with pytest.raises(PeerLost):
        log.accepted("a/b", "abort", "j", "token")
    log.refused("a/b", "abort", "j", REFUSAL)
    assert "no broker" in told[0]


def test_reasons_are_cut_to_size() -> None:
    ledger = Ledger()
    ledger.log.refused("a/b", "abort", "j", CommandRefused("abort", "a/b", ("x" * 10_000,) * 1000))
    assert len(str(ledger.entries[0])) < 10_000
