"""A job's sites, as its algorithm sees them: give them a task, take their updates one by one as they come.

Rules, whatever the transport:
- An update counts once: for the round that is on, from a site that was given its task and has not answered yet.
- It is checked whole (`fl.guard.gate`) before the algorithm sees it; a site whose update is refused is out of the job.
- A round ends when every site has answered or is lost, or at its deadline; late sites are out of the job.
- With fewer than `min_sites` updates possible the job fails at once, and names what became of each lost site.
- A site whose connection has ended, by a cut or by a lease, is away: the round's clock stands still until it is back,
  and goes on where it stood. One that is away for too long is lost, or the round goes on without it, and so do the
  following ones until it is back and takes its part again from there (`fl.server.absences`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from queue import Empty, SimpleQueue
from typing import Final

from attestation.pauses import PAUSE_SECONDS
from fl.aggregation.deltas import Delta
from fl.aggregation.mask_talk import Notary, Step
from fl.aggregation.weighted_mean import WeightedMean
from fl.errors import JobAborted, JobFailed, MalformedMessage, SpoolFailed, UpdateRefused
from fl.jobs.progress import JobEvent
from fl.model import ParamsType
from fl.server.absences import Absences
from fl.server.admission import admitted
from fl.server.questions import Questions
from fl.server.task import Aggregation, Heard, Keeper, Saved, Site, Task, Update
from fl.tensors import Schema
from fl.transport.spool import Spool
from fl.transport.stored import Stored

__all__ = ["Aggregation", "Federation", "Keeper", "Saved", "Site", "Task", "Update"]

ASK_SECONDS: Final = 30.0
"""How long a site may take for one step of secure aggregation."""
TURN_SECONDS: Final = 60.0
"""How long a transfer waits for its site's word that it is back, and for the round."""


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
        self._absences = Absences(min_sites, pause_seconds)
        self._lock = threading.Lock()
        self._turns = threading.Condition(self._lock)
        self._sites: dict[str, Site] = {}
        self._lost: dict[str, str] = {}
        self._round: int | None = None
        self._begun: int | None = None  # the round that was last announced
        self._undealt: set[str] = set()  # are to get the task that is on
        self._pending: set[str] = set()  # have the task and have not answered
        self._checking: set[str] = set()  # have answered; the check is under way
        self._task: Task | None = None
        self._admitted: dict[str, int] = {}  # the last round of which a site's update was admitted
        self._inbox: SimpleQueue[Update | Heard | str | JobAborted | JobFailed] = SimpleQueue()
        self._questions = Questions()
        self._notary: Notary | None = None

    # the transport's side

    def join(self, site: Site) -> None:
        """A site is ready. Raises UpdateRefused if its name is taken or it was lost before."""
        with self._lock:
            if site.name in self._sites or site.name in self._lost:
                raise UpdateRefused(site.name, ("a site of this name has joined this job before",))
            self._sites[site.name] = site
            self._turns.notify_all()
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
            self._absences.come_back(name, time.monotonic())
            self._turns.notify_all()
        self.observe(JobEvent(kind="refused" if kind == "refused" else "lost", site=name, text=reason))
        if site is not None:
            site.end(reason)
        self._inbox.put(name)

    def suspend(self, name: str, reason: str, *, cut: bool = False) -> None:
        """A site's connection has ended, by a `cut` or because a lease did: it may come back (`resume`) and go on."""
        with self._lock:
            if name not in self._sites or name in self._absences.names:
                return
            self._absences.leave(name, time.monotonic(), cut=cut)
        self.observe(JobEvent(kind="paused", site=name, text=reason[:2000]))
        self._inbox.put(name)

    def resume(self, site: Site) -> bool:
        """A site that is in the job is connected again, and gets its open task anew; False if it is not in the job."""
        with self._lock:
            if site.name not in self._absences.names or site.name not in self._sites:
                return False
            self._absences.come_back(site.name, time.monotonic())
            self._sites[site.name] = site
            self._turns.notify_all()
            task = self._task if site.name in self._pending else None
            again = self._questions.again(site.name, self._round)
        self.observe(JobEvent(kind="resumed", site=site.name))
        for round_, step, body in again:
            site.say(round_, step, body)
        if task is not None:
            site.give(task)
        self._inbox.put(site.name)
        return True

    def await_turn(self, name: str, round_: int | None, alive: Callable[[], bool]) -> None:
        """Wait until a site is in the job and has its task, or its update of this round was taken before.

        Waits while `alive`, TURN_SECONDS at most.

        A transfer that goes on after a cut, or with a server that took the job up, may come before its site's word.
        """
        deadline = time.monotonic() + TURN_SECONDS
        with self._turns:
            while name not in self._lost:
                here = name in self._sites and name not in self._absences.names
                given = self._round is not None and name not in self._undealt
                taken = round_ is not None and round_ <= self._admitted.get(name, -1)
                left = deadline - time.monotonic()
                if (here and (given or taken)) or left <= 0 or not alive():
                    return
                self._turns.wait(min(left, 0.5))

    def is_settled(self, name: str, round_: int) -> bool:
        """Whether nothing of this round is asked any more of a site that was away in it.

        Its update of it was admitted before, or the round went on without it.
        """
        with self._lock:
            if name not in self._sites:
                return False
            if self._absences.missed(name, round_):
                return True
            return self._absences.was_away(name) and round_ <= self._admitted.get(name, -1)

    def _given_up(self) -> Set[str]:
        """With the lock: the sites that are away and are not waited for."""
        return self._absences.names - self._absences.waited_for(len(self._sites), time.monotonic())

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
            tensors, checked = admitted(
                name,
                task,
                memory,
                schema=self.schema,
                job_type=self.params_type,
                delta=self._delta,
                params_type=params_type,
                weight=weight,
                metrics=metrics,
            )
        except SpoolFailed as error:
            memory.close()
            self._inbox.put(JobFailed(self.job, (error.what,)))
            raise
        except UpdateRefused as refusal:
            memory.close()
            self.lose(name, "; ".join(refusal.reasons), kind="refused")
            raise
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
            if not self._questions.take_answer(name, round_, step):
                if self._absences.was_away(name):
                    return
                raise MalformedMessage(f"an answer about {step} of round {round_} comes out of turn", where=name)
        self._inbox.put(Heard(name, body))

    def abort(self, by: str) -> None:
        """Stop the job."""
        self._inbox.put(JobAborted(self.job, by))

    def _out_of_turn(self, name: str, memory: Stored, reason: str) -> UpdateRefused:
        memory.close()
        self.observe(JobEvent(kind="refused", site=name, text=reason))
        return UpdateRefused(name, (reason,))

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
                now = time.monotonic()
                self._absences.start(deadline - now, now)
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
            self._undealt = set(waiting)
        if task.round != self._begun and task.round < task.total_rounds:
            self._begun = task.round
            self.observe(JobEvent(kind="round", round=task.round))
        if task.round < task.total_rounds:
            self._need(left, f"{left} sites are left at round {task.round}")
        with self._lock:
            self._absences.start(self.round_seconds, time.monotonic())
        counted = 0
        self._feed(waiting, task)
        if meanwhile is not None:
            meanwhile()
            with self._lock:
                self._absences.start(self.round_seconds, time.monotonic())
        while True:
            with self._lock:
                missing = self._pending & self._given_up()
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
            missing = self._given_up()
            sites = [self._sites[name] for name in bodies if name in self._sites and name not in missing]
            self._questions.ask(round_, step, {site.name: bodies[site.name] for site in sites})
            self._absences.start(ASK_SECONDS, time.monotonic())
        for site in sites:
            site.say(round_, step, bodies[site.name])
        try:
            while True:
                with self._lock:
                    open_ = [site.name for site in sites if site.name in self._sites and site.name not in answers]
                    missing = self._given_up()
                if missing >= set(open_):
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
            self._questions.ask(round_, step, {})
            left = len(self._sites)
        self._need(left, f"{left} sites are left at {step} of round {round_}")
        return answers

    def tell(self, round_: int, step: Step, bodies: Mapping[str, str]) -> None:
        """Say something to some sites that they do not answer, while a round is on. Who is away is told when it is back
        in that round."""
        with self._lock:
            self._questions.tell(round_, step, bodies)
            sites = [self._sites[name] for name in bodies if name in self._sites]
        for site in sites:
            site.say(round_, step, bodies[site.name])

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
                name = waiting.popleft()
                site = self._sites.get(name)
                if site is not None:
                    self._pending.add(name)
            if site is not None:
                site.give(task)
            with self._lock:
                self._undealt.discard(name)
                self._turns.notify_all()

    def _miss(self, names: Set[str], round_: int) -> None:
        with self._lock:
            self._pending -= names
            self._absences.miss(names, round_)

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
                held_by = self._absences.waited_for(len(self._sites), now)
                limit = self._absences.next_look(len(self._sites), now)
            try:
                event = self._inbox.get(timeout=max(0.0, limit - now))
            except Empty:
                with self._lock:
                    too_long = self._absences.too_long(time.monotonic())
                for name in too_long:
                    self.lose(name, f"did not come back within {self._absences.pause_seconds:.0f} s of pauses")
                with self._lock:
                    now = time.monotonic()
                    given_up = held_by - self._absences.waited_for(len(self._sites), now)
                    over = self._absences.over(len(self._sites), now)
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
