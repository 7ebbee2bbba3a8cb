"""Who is away and how the clock stands still: of any history of sites that come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fl.server.absences import MISSED_SECONDS, Absences

NAMES = ("a", "b", "c")
moves = st.lists(st.tuples(st.sampled_from(NAMES), st.booleans(), st.floats(0.1, 30)), max_size=30)


@given(moves)
def test_time_passes_only_while_nobody_that_is_needed_is_away(history: list[tuple[str, bool, float]]) -> None:
    absences = Absences(len(NAMES), pause_seconds=1e9)
    now = passed = 0.0
    absences.start(100.0, now)
    for name, cut, seconds in history:
        if name in absences.names:
            absences.come_back(name, now)
        else:
            absences.leave(name, now, cut=cut)
        now += seconds
        passed += 0.0 if absences.names else seconds
        if passed > 100:
            assert absences.names or absences.over(len(NAMES), now)
            return
        assert not absences.over(len(NAMES), now)
    for name in list(absences.names):
        absences.come_back(name, now)
    left = 100.0 - passed
    assert not absences.over(len(NAMES), now + left - 1e-6)
    assert absences.over(len(NAMES), now + left + 1e-6)


@given(moves)
def test_nobody_is_away_for_longer_than_the_pauses_in_all(history: list[tuple[str, bool, float]]) -> None:
    absences = Absences(len(NAMES), pause_seconds=60.0)
    now, gone = 0.0, dict.fromkeys(NAMES, 0.0)
    absences.start(1e9, now)
    for name, cut, seconds in history:
        if name in absences.names:
            absences.come_back(name, now)
        else:
            absences.leave(name, now, cut=cut)
        now += seconds
        for away in absences.names:
            gone[away] += seconds
        too_long = absences.too_long(now)
        assert set(too_long) <= absences.names
        for away in absences.names:
            if abs(gone[away] - 60.0) > 1e-6:
                assert (away in too_long) == (gone[away] > 60.0)


def test_a_cut_site_that_is_not_needed_is_waited_for_a_while_and_one_that_paused_longer() -> None:
    absences = Absences(1, pause_seconds=1e9)
    absences.start(10.0, 0.0)
    absences.leave("a", 5.0, cut=True)
    assert absences.waited_for(2, 6.0) == {"a"}
    assert absences.next_look(2, 6.0) == 5.0 + MISSED_SECONDS
    assert absences.waited_for(2, 5.0 + MISSED_SECONDS) == set()
    assert absences.over(2, 5.0 + MISSED_SECONDS)
    assert absences.waited_for(1, 5.0 + MISSED_SECONDS) == {"a"}
    absences.miss({"a"}, 0)
    assert absences.missed("a", 0)
    assert not absences.missed("a", 1)
    absences.come_back("a", 200.0)
    absences.leave("a", 201.0, cut=False)
    assert absences.waited_for(2, 201.0 + MISSED_SECONDS) == {"a"}
