"""A job's sites, as its algorithm sees them: give them a task, take their updates one by one as they come.

Rules, whatever the transport:
- An update counts once: for the round that is on, from a site that was given its task and has not answered yet.
- It is checked whole (`fl.guard.gate`) before the algorithm sees it; a site whose update is refused is out of the job.
- A round ends when every site has answered or is lost, or at its deadline; late sites are out of the job.
- With fewer than `min_sites` updates possible the job fails at once, and names what became of each lost site.
- A site whose connection has ended, by a cut or by a lease, is away: the round's clock stands still until it is back,
  and goes on where it stood. A site that is away for longer than `pause_seconds` in all, in one job, is lost.
- A site that a cut keeps away and without which `min_sites` are there is waited for MISSED_SECONDS; then the round goes
  on without it, and so do the following ones until it is back, which takes its part again from there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from attestation.pauses import PAUSE_SECONDS
from fl.aggregation.deltas import Delta
from fl.aggregation.mask_talk import Notary, Step
from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import JobAborted, JobFailed, MalformedMessage, MalformedTensors, SpoolFailed, UpdateRefused
from fl.guard.gate import admit_update
from fl.jobs.progress import JobEvent
from fl.jobs.settings import TaskKind
from fl.model import MAX_WEIGHT, ParamsType, check_metrics
from fl.tensors import Schema, TensorFile
from fl.transport.spool import Spool
from fl.transport.stored import Stored

MISSED_SECONDS: Final = 90.0
"""How long a round waits for a site that a cut keeps away and without which enough are there."""


ASK_SECONDS: Final = 30.0
"""How long a site may take for one step of secure aggregation."""


@dataclass(frozen=True, slots=True)
class Task:
    """Do with the model of one round what `kind` says."""

    round: int
    total_rounds: int
    model: Stored
    kind: TaskKind = "train"


class Keeper(Protocol):
    """What keeps a job's state from round to round, so that it can go on after its server or its author stopped."""

    def saved(self) -> Saved | None:
        """Where the job stood, if it is to go on from there."""

    def save(self, saved: Saved) -> None:
        """Keep where the job stands; the memory stays the algorithm's."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a job stands between two rounds: the next one, its model, and what the algorithm remembers beside it.

    `state` holds the algorithm's own arrays (an optimizer's moments) by name; `judged` the best metric so far and the
    rounds since, if rounds are judged.
    """

    round: int
    model: Stored
    state: Mapping[str, Any]
    judged: Mapping[str, float]


@dataclass(slots=True)
class Update:
    """A site's admitted update. `close` gives its memory back."""

    site: str
    tensors: TensorFile
    memory: Stored
    params_type: ParamsType
    weight: float
    metrics: Mapping[str, float]

    def close(self) -> None:
        """Give the update's memory back."""
        self.tensors.release()
        self.memory.close()


class Site(Protocol):
    """A connected site, as its transport makes it. Its methods return at once."""

    @property
    def name(self) -> str:
        """The site's name, unique in the job."""

    def give(self, task: Task) -> None:
        """Give the site a task; the answer comes through `Federation.submit` or `Federation.lose`."""

    def say(self, round_: int, step: Step, body: str) -> None:
        """Say something of secure aggregation; the answer comes through `Federation.hear` or `Federation.lose`."""

    def end(self, why: str) -> None:
        """Tell the site that it is out of the job, or that the job is over."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a site answered to what it was asked."""

    site: str
    body: str


class Aggregation(Protocol):
    """Makes the next model of the updates of a round; `result` ends one round, the next `fold` begins another."""

    def fold(self, update: TensorFile, weight: float, site: str = "") -> None:
        """Add an admitted update with `weight` > 0."""

    def result(self, model: TensorFile) -> Stored:
        """The next global model, after `model`."""

    def close(self) -> None:
        """End it."""


class Federation:
    """The sites of one job.

    Transports call `join`, `submit`, `value` and `lose` from any thread, anyone `abort`, the algorithm the rest.
    """

    def __init__(
        self,
        job: str,
        schema: Schema,
        params_type: ParamsType,
        *,
        min_sites: int,
        round_seconds: float,
        observe: Callable[[JobEvent], None],
        at_once: int | None = None,
        pause_seconds: float = PAUSE_SECONDS,
        keeper: Keeper | None = None,
        aggregation: Callable[[], Aggregation] | None = None,
        spool: Spool | None = None,
        delta: Delta | None = None,
    ) -> None:
        """`at_once` bounds how many sites train at the same time (None: all).

        `keeper` keeps the job's state between rounds; `aggregation` makes what folds updates, instead of a mean. Where
        a model is too large for memory, what is made of it lies in the `spool`, if there is one. With `delta` updates
        are differences that come encoded.
        """
        self.spool = spool
        self._delta = delta
        self.keeper = keeper
        self.best: Stored | None = None
        """The best model so far, where rounds are judged; the environment's to close."""
        self._aggregation = aggregation
        self.job = job
        self.schema = schema
        self.params_type = params_type
        self.observe = observe
        self._min_sites = min_sites
        self.round_seconds = round_seconds
        self._at_once = at_once
        self._pause_seconds = pause_seconds
        self._lock = threading.Lock()
        self._sites: dict[str, Site] = {}
        self._lost: dict[str, str] = {}
        self._round: int | None = None
        self._begun: int | None = None  # the round that was last announced
        self._pending: set[str] = set()  # have the task and have not answered
        self._checking: set[str] = set()  # have answered; the check is under way
        self._task: Task | None = None
        self._away: dict[str, float] = {}  # since when, by the running clock
        self._cut: set[str] = set()  # of these: those that nothing but the network keeps away
        self._absence: dict[str, float] = {}  # seconds that a site was away so far
        self._admitted: dict[str, int] = {}  # the last round of which a site's update was admitted
        self._missed: set[tuple[str, int]] = set()  # sites, and the rounds that went on without them
        self._deadline = 0.0  # of the round that is on
        self._stopped_at = 0.0  # since when the round's clock stands still, while a site is away
        self._inbox: SimpleQueue[Update | Heard | str | JobAborted | JobFailed] = SimpleQueue()
        self._asked: tuple[int, Step, dict[str, str]] = (-1, "keys", {})  # what was said, to whom has not answered yet
        self._notary: Notary | None = None

    # the transport's side

    def join(self, site: Site) -> None:
        """A site is ready. Raises UpdateRefused if its name is taken or it was lost before."""
        with self._lock:
            if site.name in self._sites or site.name in self._lost:
                raise UpdateRefused(site.name, ("a site of this name has joined this job before",))
            self._sites[site.name] = site
        self.observe(JobEvent(kind="joined", site=site.name))
        self._inbox.put(site.name)

    def lose(self, name: str, reason: str, *, kind: str = "lost") -> None:
        """A site is out of the job, with the reason that people will read. Later calls change nothing."""
        reason = reason[:2000]
        with self._lock:
            if name in self._lost:
                return
            self._lost[name] = reason
            self._pending.discard(name)
            self._checking.discard(name)
            site = self._sites.pop(name, None)
            self._returned(name)
        self.observe(JobEvent(kind="refused" if kind == "refused" else "lost", site=name, text=reason))
        if site is not None:
            site.end(reason)
        self._inbox.put(name)

    def suspend(self, name: str, reason: str, *, cut: bool = False) -> None:
        """A site's connection has ended, by a `cut` or because a lease did: it may come back (`resume`) and go on."""
        with self._lock:
            if name not in self._sites or name in self._away:
                return
            self._away[name] = time.monotonic()
            if cut:
                self._cut.add(name)
            if len(self._away) == 1:
                self._stopped_at = self._away[name]
        self.observe(JobEvent(kind="paused", site=name, text=reason[:2000]))
        self._inbox.put(name)

    def resume(self, site: Site) -> bool:
        """A site that is in the job is connected again, and gets its open task anew; False if it is not in the job."""
        with self._lock:
            if site.name not in self._away or site.name not in self._sites:
                return False
            self._returned(site.name)
            self._sites[site.name] = site
            task = self._task if site.name in self._pending else None
            round_, step, unanswered = self._asked
            body = unanswered.get(site.name)
        self.observe(JobEvent(kind="resumed", site=site.name))
        if body is not None:
            site.say(round_, step, body)
        if task is not None:
            site.give(task)
        self._inbox.put(site.name)
        return True

    def is_settled(self, name: str, round_: int) -> bool:
        """Whether nothing of this round is asked any more of a site that was away in it.

        Its update of it was admitted before, or the round went on without it.
        """
        with self._lock:
            if name not in self._sites:
                return False
            if (name, round_) in self._missed:
                return True
            return name in self._absence and round_ <= self._admitted.get(name, -1)

    def _waited_for(self) -> tuple[set[str], float | None]:
        """With the lock: the sites that are away and for which the round waits; when one of them first is no more."""
        enough = len(self._sites) - len(self._away) >= self._min_sites
        spare = {name: self._away[name] + MISSED_SECONDS for name in self._cut if enough}
        now = time.monotonic()
        return (
            {name for name in self._away if spare.get(name, now + 1) > now},
            min((until for until in spare.values() if until > now), default=None),
        )

    def _returned(self, name: str) -> None:
        """With the lock: a site is not away any more; when none is, the round's clock goes on."""
        since = self._away.pop(name, None)
        self._cut.discard(name)
        if since is None:
            return
        now = time.monotonic()
        self._absence[name] = self._absence.get(name, 0.0) + now - since
        if not self._away:
            self._deadline += now - self._stopped_at

    def submit(
        self,
        name: str,
        round_: int,
        memory: Stored,
        *,
        params_type: ParamsType,
        weight: float,
        metrics: Mapping[str, float],
    ) -> None:
        """Take a site's update; the memory is this federation's from now on.

        Raises UpdateRefused: for an update out of turn (a second one, another round's), which changes nothing, and for
        one that fails its checks, which puts the site out of the job.
        """
        with self._lock:
            if name in self._lost:
                raise self._out_of_turn(name, memory, f"the site is out of the job: {self._lost[name]}")
            if self._round is None or round_ != self._round:
                raise self._out_of_turn(name, memory, f"it is of round {round_}; the round that is on is {self._round}")
            if name not in self._pending:
                raise self._out_of_turn(
                    name, memory, f"the site has no open task of round {round_}: an update counts once"
                )
            self._pending.discard(name)
            self._checking.add(name)
            task = self._task
        assert task is not None  # noqa: S101 - a round is on
        try:
            reasons = tuple(self._reasons_about(task, params_type, weight))
            if reasons:
                raise UpdateRefused(name, reasons)
            checked = check_metrics(metrics)
            schema = {} if task.kind == "evaluate" else self.schema
            tensors = admit_update(
                memory.source, schema, site=name, delta=self._delta if task.kind == "train" else None
            )
        except SpoolFailed as error:
            memory.close()
            self._inbox.put(JobFailed(self.job, (error.what,)))
            raise
        except (UpdateRefused, MalformedTensors) as error:
            memory.close()
            refusal = error if isinstance(error, UpdateRefused) else UpdateRefused(name, (error.what,))
            self.lose(name, "; ".join(refusal.reasons), kind="refused")
            raise refusal from error
        with self._lock:
            if name in self._checking:
                self._checking.discard(name)
                self._admitted[name] = round_
                self._inbox.put(Update(name, tensors, memory, params_type, weight, checked))
                return
        raise self._out_of_turn(name, memory, "the site was lost while its update was checked")

    def value(self, name: str, key: str, value: float, step: int) -> None:
        """A number that a site's script logged."""
        self.observe(JobEvent(kind="value", site=name, round=step, values={key: value}))

    def line(self, name: str, text: str, round_: int) -> None:
        """A line of text that a site's script logged."""
        self.observe(JobEvent(kind="line", site=name, round=round_, text=text))

    def hear(self, name: str, round_: int, step: Step, body: str) -> None:
        """A site answers what it was asked, once. Raises MalformedMessage for an answer that nobody asked for.

        One that was away may answer twice, or too late: that is nothing.
        """
        with self._lock:
            if (round_, step) != self._asked[:2] or name not in self._asked[2]:
                if name in self._absence:
                    return
                raise MalformedMessage(f"an answer about {step} of round {round_} comes out of turn", where=name)
            del self._asked[2][name]
        self._inbox.put(Heard(name, body))

    def abort(self, by: str) -> None:
        """Stop the job."""
        self._inbox.put(JobAborted(self.job, by))

    def _out_of_turn(self, name: str, memory: Stored, reason: str) -> UpdateRefused:
        memory.close()
        self.observe(JobEvent(kind="refused", site=name, text=reason))
        return UpdateRefused(name, (reason,))

    def _reasons_about(self, task: Task, params_type: ParamsType, weight: float) -> Iterator[str]:
        wanted = ParamsType.FULL if task.kind == "submit_model" else self.params_type
        if params_type is not wanted:
            yield f"its parameters are {params_type}, the job's are {wanted}"
        if not 0 < weight <= MAX_WEIGHT:
            yield f"its weight {weight} is not above 0 and at most {MAX_WEIGHT:.0f}"

    # the algorithm's side

    def gather(self, expected: Collection[str], seconds: float) -> None:
        """Wait until every expected site has joined or is lost, at most `seconds`.

        Raises JobFailed if fewer than `min_sites` have joined then.
        """
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                missing = [name for name in expected if name not in self._sites and name not in self._lost]
            if not missing:
                break
            with self._lock:
                self._deadline = deadline
            event = self._next()
            if event is None:
                for name in missing:
                    self.lose(name, f"did not join within {seconds:.0f} s")
                break
        with self._lock:
            joined = len(self._sites)
        self._need(joined, f"{joined} of {len(expected)} sites joined")

    def aggregation(self) -> Aggregation:
        """What folds this job's updates: a weighted mean, or the job's own aggregator. The caller's to close."""
        if self._aggregation is not None:
            return self._aggregation()
        return WeightedMean(self.schema, self.params_type, self.spool)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that are in the job, sorted."""
        with self._lock:
            return tuple(sorted(self._sites))

    def train(
        self,
        task: Task,
        only: str | None = None,
        *,
        among: Collection[str] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Iterator[Update]:
        """Give every site the task; yield the admitted updates as they come, each to be closed by the caller.

        `among`: the sites that can take part in this round; the others sit it out. `meanwhile` is called when the task
        is given; it may `ask`.

        With `only`, that site alone gets it, and the round may go on with another; an update of it is not demanded, and
        none is after the rounds of training, where only an evaluation can suffer.
        Raises JobFailed when fewer than `min_sites` updates are possible, JobAborted when someone stops the job.
        """
        demanded = only is None and task.round < task.total_rounds
        with self._lock:
            self._round, self._task = task.round, task
            self._pending.clear()
            self._checking.clear()
            left = len(self._sites)
            chosen = self._sites.keys() if among is None else self._sites.keys() & among
            waiting = deque(sorted(chosen) if only is None else [only] if only in self._sites else [])
        if task.round != self._begun and task.round < task.total_rounds:
            self._begun = task.round
            self.observe(JobEvent(kind="round", round=task.round))
        if task.round < task.total_rounds:
            self._need(left, f"{left} sites are left at round {task.round}")
        with self._lock:
            self._deadline = self._stopped_at = time.monotonic()
            self._deadline += self.round_seconds
        counted = 0
        self._feed(waiting, task)
        if meanwhile is not None:
            meanwhile()
            with self._lock:
                self._deadline = time.monotonic() + self.round_seconds
        while True:
            with self._lock:
                missing = {name for name in self._pending if name in self._away} - self._waited_for()[0]
                open_ = len(self._pending - missing) + len(self._checking)
                open_ += sum(1 for name in waiting if name in self._sites)
                possible = counted + open_
                unread = not self._inbox.empty()
            if not unread and not open_:
                self._miss(missing, task.round)
                break
            if not unread and demanded:
                self._need(possible, f"at most {possible} updates are possible in round {task.round}")
            event = self._next()
            if event is None:
                self._drop_late(waiting)
                break
            if isinstance(event, Update):
                counted += 1
                if task.round < task.total_rounds:
                    self.observe(
                        JobEvent(
                            kind="update",
                            site=event.site,
                            round=task.round,
                            weight=event.weight,
                            values=dict(event.metrics),
                        )
                    )
                yield event
            self._feed(waiting, task)
        with self._lock:
            self._round = None
        if demanded:
            self._need(counted, f"round {task.round} has {counted} updates")

    @property
    def notary(self) -> Notary:
        """Who vouches for the sites' keys in secure aggregation. Raises ValueError if nobody was named."""
        if self._notary is None:
            raise ValueError("this federation has no notary")
        return self._notary

    @notary.setter
    def notary(self, notary: Notary) -> None:
        self._notary = notary

    def ask(self, round_: int, step: Step, bodies: Mapping[str, str]) -> dict[str, str]:
        """Say something to some sites, and wait for their answers, ASK_SECONDS at most; who has not answered then is
        out of the job. A site that is away is waited for as in a round, and is told again when it is back.

        Raises JobFailed when fewer than `min_sites` are left, JobAborted when someone stops the job.
        """
        answers: dict[str, str] = {}
        aside: list[Update] = []
        with self._lock:
            missing = self._away.keys() - self._waited_for()[0]
            sites = [self._sites[name] for name in bodies if name in self._sites and name not in missing]
            self._asked = (round_, step, {site.name: bodies[site.name] for site in sites})
            self._deadline = self._stopped_at = time.monotonic()
            self._deadline += ASK_SECONDS
        for site in sites:
            site.say(round_, step, bodies[site.name])
        try:
            while True:
                with self._lock:
                    open_ = [site.name for site in sites if site.name in self._sites and site.name not in answers]
                    missing = self._away.keys() - self._waited_for()[0]
                if missing.issuperset(open_):
                    break
                event = self._next()
                if event is None:
                    for name in open_:
                        self.lose(name, f"did not answer about {step} within {ASK_SECONDS:.0f} s")
                elif isinstance(event, Heard):
                    answers[event.site] = event.body
                elif isinstance(event, Update):
                    aside.append(event)
        finally:
            for update in aside:
                self._inbox.put(update)
        with self._lock:
            self._asked = (round_, step, {})
            left = len(self._sites)
        self._need(left, f"{left} sites are left at {step} of round {round_}")
        return answers

    def finish(self, why: str) -> None:
        """The job is over: every site is told."""
        with self._lock:
            sites = list(self._sites.values())
            self._sites.clear()
            self._round = None
        for site in sites:
            site.end(why)
        with contextlib.suppress(Empty):
            while True:
                if isinstance(unread := self._inbox.get_nowait(), Update):
                    unread.close()

    @property
    def lost(self) -> Mapping[str, str]:
        """The sites that are out of the job, each with the reason."""
        with self._lock:
            return dict(self._lost)

    def _feed(self, waiting: deque[str], task: Task) -> None:
        while waiting:
            with self._lock:
                if self._at_once is not None and len(self._pending) >= self._at_once:
                    return
                site = self._sites.get(waiting.popleft())
                if site is None:
                    continue
                self._pending.add(site.name)
            site.give(task)

    def _miss(self, names: set[str], round_: int) -> None:
        with self._lock:
            self._pending -= names
            self._missed |= {(name, round_) for name in names}

    def _drop_late(self, waiting: deque[str]) -> None:
        with self._lock:
            late = [*self._pending, *self._checking, *waiting]
        for name in late:
            self.lose(name, f"did not answer within {self.round_seconds:.0f} s")
        waiting.clear()

    def _next(self) -> Update | Heard | str | None:
        """The next event; None when the round's time is over, which it never is while it waits for a site that is away.

        When a site is waited for no more, that is an event, too: its name.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                ends = {
                    name: since + max(0.0, self._pause_seconds - self._absence.get(name, 0.0))
                    for name, since in self._away.items()
                }
                held_by, until = self._waited_for()
                limit = min(ends.values(), default=self._deadline)
                if not held_by:
                    limit = min(limit, self._deadline)
                if until is not None:
                    limit = min(limit, until)
            try:
                event = self._inbox.get(timeout=max(0.0, limit - now))
            except Empty:
                for name, end in ends.items():
                    if end <= time.monotonic():
                        self.lose(name, f"did not come back within {self._pause_seconds:.0f} s of pauses")
                with self._lock:
                    given_up = held_by - self._waited_for()[0]
                    over = not self._waited_for()[0] and time.monotonic() >= self._deadline
                if given_up:
                    return next(iter(given_up))
                if over:
                    return None
                continue
            if isinstance(event, JobAborted | JobFailed):
                raise event
            return event

    def _need(self, count: int, fact: str) -> None:
        if count < self._min_sites:
            lost = tuple(f"{name}: {reason}" for name, reason in sorted(self.lost.items()))
            raise JobFailed(self.job, (f"{fact}, {self._min_sites} are needed", *lost))
