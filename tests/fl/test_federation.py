"""The rules of a round: an update counts once, late and lost sites are named, and too few of them end the job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fl.errors import JobAborted, JobFailed, UpdateRefused
from fl.jobs.progress import JobEvent
from fl.jobs.settings import JobSettings, TensorSettings
from fl.model import ParamsType, params_of, schema_of, tensors_of
from fl.recipes.fedavg import fedavg
from fl.server.federation import Federation, Task
from fl.tensors import encode, parse
from fl.transport.memory import SealedMemory

MODEL = {"w": np.zeros(4, dtype=np.float32)}


def memory_of(value: float) -> SealedMemory:
    return SealedMemory.of(encode(tensors_of({"w": np.full(4, value, dtype=np.float32)})))


class PlayedSite:
    """A site that answers each task by what `play` does with it."""

    def __init__(self, name: str, play: Callable[[PlayedSite, Task], None]) -> None:
        self.name = name
        self.ended: list[str] = []
        self._play = play

    def give(self, task: Task) -> None:
        threading.Thread(target=self._play, args=(self, task)).start()

    def end(self, why: str) -> None:
        self.ended.append(why)


class Stage:
    """A federation with its events."""

    def __init__(
        self,
        *,
        min_sites: int = 2,
        round_seconds: float = 5.0,
        at_once: int | None = None,
        pause_seconds: float = 60.0,
    ) -> None:
        self.events: list[JobEvent] = []
        self.federation = Federation(
            "job-1",
            schema_of(tensors_of(MODEL)),
            ParamsType.FULL,
            min_sites=min_sites,
            round_seconds=round_seconds,
            observe=self.events.append,
            at_once=at_once,
            pause_seconds=pause_seconds,
        )

    def join(self, name: str, play: Callable[[PlayedSite, Task], None]) -> PlayedSite:
        site = PlayedSite(name, play)
        self.federation.join(site)
        return site

    def submit(self, name: str, round_: int, memory: SealedMemory, **changes: Any) -> None:
        fields: dict[str, Any] = {"params_type": ParamsType.FULL, "weight": 1.0, "metrics": {}, **changes}
        self.federation.submit(name, round_, memory, **fields)

    def answer(self, value: float, **changes: Any) -> Callable[[PlayedSite, Task], None]:
        return lambda site, task: self.submit(site.name, task.round, memory_of(value), **changes)

    def one_round(self) -> list[str]:
        names = []
        with SealedMemory.of(encode(tensors_of(MODEL))) as model:
            for update in self.federation.train(Task(0, 1, model)):
                names.append(update.site)
                update.close()
        return sorted(names)

    def run(self, rounds: int = 2) -> float:
        settings = JobSettings(
            name="job",
            recipe="fedavg",
            num_rounds=rounds,
            min_clients=2,
            train_script="client.py",
            framework="numpy",
            model={"w": TensorSettings(dtype="F32", shape=(4,))},
        )
        with fedavg(self.federation, settings, SealedMemory.of(encode(tensors_of(MODEL)))) as result:
            return float(params_of(parse(result.view, max_size=result.size), "numpy")["w"][0])

    def told(self, kind: str) -> list[tuple[str | None, str]]:
        return [(event.site, event.text) for event in self.events if event.kind == kind]


def refused(stage: Stage, site: PlayedSite, task: Task, memory: SealedMemory, **changes: Any) -> None:
    with pytest.raises(UpdateRefused):
        stage.submit(site.name, task.round, memory, **changes)


def test_federated_averaging_weights_updates_and_tells_metrics() -> None:
    stage = Stage()
    stage.join("a", stage.answer(1.0, weight=1.0, metrics={"loss": 4.0}))
    stage.join("b", stage.answer(5.0, weight=3.0, metrics={"loss": 8.0}))
    assert stage.run() == 4.0
    assert [event.values for event in stage.events if event.kind == "aggregated"] == [{"loss": 7.0}] * 2


def test_a_second_update_of_a_round_is_refused_and_the_first_counts() -> None:
    stage = Stage()
    refusals = threading.Event()

    def twice(site: PlayedSite, task: Task) -> None:
        stage.submit(site.name, task.round, memory_of(2.0))
        refused(stage, site, task, memory_of(100.0))
        refusals.set()

    def after(site: PlayedSite, task: Task) -> None:
        assert refusals.wait(5)
        refusals.clear()
        stage.submit(site.name, task.round, memory_of(2.0))

    stage.join("a", twice)
    stage.join("b", after)
    assert stage.run() == 2.0
    assert stage.told("refused") == [
        ("a", f"the site has no open task of round {round_}: an update counts once") for round_ in (0, 1)
    ]


def test_an_update_of_another_round_or_before_any_is_refused() -> None:
    stage = Stage(min_sites=1)
    stage.join("a", stage.answer(1.0))
    with pytest.raises(UpdateRefused, match="the round that is on is None"):
        stage.submit("a", 0, memory_of(1.0))
    assert stage.one_round() == ["a"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight": float("nan")}, "weight"),
        ({"weight": 0.0}, "weight"),
        ({"params_type": ParamsType.DIFF}, "parameters are DIFF"),
        ({"metrics": {"x": float("inf")}}, "not a finite number"),
    ],
)
def test_a_bad_head_puts_the_site_out_and_the_job_goes_on(changes: dict[str, Any], reason: str) -> None:
    stage = Stage()
    stage.join("a", stage.answer(1.0))
    stage.join("b", stage.answer(1.0))
    bad = stage.join("c", lambda site, task: refused(stage, site, task, memory_of(1.0), **changes))
    assert stage.run() == 1.0
    assert reason in stage.told("refused")[0][1]
    assert reason in bad.ended[0]


def test_a_malformed_update_never_reaches_the_mean() -> None:
    stage = Stage()
    stage.join("a", stage.answer(1.0))
    stage.join("b", stage.answer(1.0))
    stage.join("c", lambda site, task: refused(stage, site, task, SealedMemory.of(b"not tensors")))
    stage.join("d", lambda site, task: refused(stage, site, task, memory_of(float("nan"))))
    assert stage.run() == 1.0
    assert sorted(site or "" for site, _ in stage.told("refused")) == ["c", "d"]


def test_a_site_that_dies_is_named_and_the_job_goes_on_with_enough() -> None:
    stage = Stage()
    stage.join("a", stage.answer(1.0))
    stage.join("b", stage.answer(1.0))
    stage.join("c", lambda site, _: stage.federation.lose(site.name, "its connection was cut"))
    assert stage.run() == 1.0
    assert stage.told("lost") == [("c", "its connection was cut")]


def test_with_too_few_sites_left_the_job_fails_at_once_and_names_them() -> None:
    stage = Stage(round_seconds=60)
    stage.join("a", lambda *_: None)
    stage.join("b", lambda site, _: stage.federation.lose(site.name, "its connection was cut"))
    with pytest.raises(JobFailed, match="at most 1 updates are possible") as failure:
        stage.run()
    assert "b: its connection was cut" in failure.value.reasons


def test_a_late_site_is_out_at_the_deadline() -> None:
    stage = Stage(round_seconds=0.3)
    stage.join("a", stage.answer(1.0))
    stage.join("b", stage.answer(1.0))
    stage.join("slow", lambda *_: None)
    assert stage.run() == 1.0
    assert stage.told("lost") == [("slow", "did not answer within 0 s")]


def test_gathering_is_bounded_and_names_who_is_missing() -> None:
    stage = Stage()
    stage.join("a", stage.answer(1.0))
    with pytest.raises(JobFailed, match="1 of 3 sites joined, 2 are needed") as failure:
        stage.federation.gather(["a", "b", "c"], 0.2)
    assert "b: did not join within 0 s" in failure.value.reasons


def test_a_name_joins_once() -> None:
    stage = Stage()
    stage.join("a", stage.answer(1.0))
    with pytest.raises(UpdateRefused, match="has joined this job before"):
        stage.join("a", stage.answer(1.0))


def test_abort_ends_the_round() -> None:
    stage = Stage(round_seconds=60)
    stage.join("a", lambda *_: stage.federation.abort("acme-pharma/ada"))
    stage.join("b", lambda *_: None)
    with pytest.raises(JobAborted, match="acme-pharma/ada"):
        stage.run()


def test_no_more_than_so_many_train_at_once() -> None:
    stage = Stage(at_once=2, min_sites=6)
    lock, now, most = threading.Lock(), [0], [0]

    def count(site: PlayedSite, task: Task) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1
        stage.submit(site.name, task.round, memory_of(1.0))

    for number in range(6):
        stage.join(f"site-{number}", count)
    assert len(stage.one_round()) == 6
    assert most[0] <= 2


def away_then(stage: Stage, site: PlayedSite, seconds: float, then: Callable[[], None]) -> None:
    stage.federation.suspend(site.name, "its lease ended")
    threading.Timer(seconds, then).start()


def test_a_site_that_was_away_gets_its_open_task_again_and_the_clock_stood_still() -> None:
    stage = Stage(round_seconds=1.0)
    back = PlayedSite("b", stage.answer(5.0))

    def leave(site: PlayedSite, _task: Task) -> None:
        away_then(stage, site, 1.5, lambda: stage.federation.resume(back) or None)

    stage.join("a", stage.answer(3.0))
    stage.join("b", leave)
    assert stage.run(rounds=1) == 4.0
    assert stage.told("paused") == [("b", "its lease ended")]
    assert stage.told("resumed") == [("b", "")]
    assert stage.told("lost") == []


def test_a_transfer_that_is_quicker_than_its_site_s_word_waits_for_its_turn() -> None:
    """After a cut a site delivers anew before the server has heard that it is back: the update is neither refused nor
    counted twice. One that answers again without having been away is refused at once."""
    stage = Stage(round_seconds=20.0)
    turns: list[tuple[str, bool]] = []
    finish = threading.Event()

    def wait(name: str, round_: int) -> None:
        stage.federation.await_turn(name, round_, lambda: True)
        turns.append((name, stage.federation.is_settled(name, round_)))

    def answer_and_leave(site: PlayedSite, task: Task) -> None:
        stage.submit(site.name, task.round, memory_of(5.0))
        stage.federation.suspend(site.name, "its connection broke", cut=True)
        early = threading.Thread(target=wait, args=(site.name, task.round))
        early.start()
        early.join(0.3)
        assert early.is_alive()
        stage.federation.resume(PlayedSite("b", lambda _site, _task: None))
        early.join(5)
        assert turns == [("b", True)]
        finish.set()

    def late(site: PlayedSite, task: Task) -> None:
        finish.wait(5)
        stage.submit(site.name, task.round, memory_of(3.0))
        wait(site.name, task.round)
        assert turns[-1] == ("a", False)
        refused(stage, site, task, memory_of(100.0))

    stage.join("a", late)
    first = threading.Thread(
        target=stage.federation.await_turn, args=("b", 0, lambda: True)
    )  # as with a server that took the job up
    first.start()
    first.join(0.2)
    assert first.is_alive()
    stage.join("b", answer_and_leave)
    assert stage.run(rounds=1) == 4.0
    first.join(5)
    assert not first.is_alive()


def test_a_site_that_has_answered_before_it_was_away_is_not_asked_again_and_counts_once() -> None:
    stage = Stage(round_seconds=5.0)
    given: list[int] = []
    back = PlayedSite("b", lambda _site, task: given.append(task.round))

    def answer_and_leave(site: PlayedSite, task: Task) -> None:
        stage.submit(site.name, task.round, memory_of(5.0))
        stage.federation.suspend(site.name, "its lease ended")
        assert not stage.federation.is_settled("b", task.round)
        stage.federation.resume(back)
        assert stage.federation.is_settled("b", task.round)
        assert not stage.federation.is_settled("a", task.round)
        refused(stage, site, task, memory_of(100.0))
        finish.set()

    finish = threading.Event()

    def late(site: PlayedSite, task: Task) -> None:
        finish.wait(5)
        stage.submit(site.name, task.round, memory_of(3.0))

    stage.join("a", late)
    stage.join("b", answer_and_leave)
    assert stage.run(rounds=1) == 4.0
    assert given == []


def test_a_site_that_does_not_come_back_is_lost_after_the_pause() -> None:
    stage = Stage(min_sites=1, round_seconds=30.0, pause_seconds=0.3)
    stage.join("a", stage.answer(3.0))
    stage.join("b", lambda site, _: stage.federation.suspend(site.name, "its lease ended"))
    assert stage.one_round() == ["a"]
    assert stage.told("lost") == [("b", "did not come back within 0 s of pauses")]


def test_pauses_add_up_over_a_job() -> None:
    stage = Stage(min_sites=1, round_seconds=30.0, pause_seconds=0.6)
    times: list[int] = []

    def often(site: PlayedSite, _task: Task) -> None:
        times.append(1)
        away_then(stage, site, 0.25, lambda: stage.federation.resume(site) or None)

    stage.join("a", often)
    with pytest.raises(JobFailed, match="0 updates"):
        stage.one_round()
    assert len(times) == 3


def test_who_is_not_in_the_job_does_not_come_back_to_it() -> None:
    stage = Stage()
    assert not stage.federation.resume(PlayedSite("a", stage.answer(1.0)))
    site = stage.join("a", stage.answer(1.0))
    assert not stage.federation.resume(site), "it was not away"
    stage.federation.suspend("a", "its lease ended")
    stage.federation.lose("a", "it was refused")
    assert not stage.federation.resume(site)
