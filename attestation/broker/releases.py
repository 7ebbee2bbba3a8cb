"""Releases at once: each decided over counters that count all before it, without waiting for them to be on disk.

Decisions over one resource are made one after another, in the order in which they then reach the database's writer. A
decision counts what the database has and, beyond that, the releases that are still on their way there; the writer
checks that it counted right. So many guests may have one resource at the same time, and a limit of N is N. Those who
wait while one decision is made are decided for together, one after another, on one thread.

Processes on one database take turns over a resource, TURN_SECONDS each while another waits or not: what one decides is
on the disk before the other counts. The writer's check holds without it too; the turns spare deciding anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

from attestation.broker import journal
from attestation.broker.database import TURNS
from attestation.broker.keks import KeyEncryption, open_resource
from attestation.broker.release import Counters, decide_releases
from attestation.broker.release import Question as ReleaseQuestion
from attestation.broker.rules import floor_rules, owner_rules
from attestation.broker.sessions import Session, age_seconds
from attestation.broker.storage import Storage, StoredResource, Transaction
from attestation.broker.vault_states import Sight, boot_of, sight
from attestation.ear import Ear
from attestation.errors import BrokerUnavailable, ReleaseRefused
from attestation.ledger.receipt import Receipt
from attestation.messages import not_deposited
from attestation.split import kept_as, parse_share
from attestation.vaults import Claim, VaultState, open_reasons, opened, place_reasons
from policies.charter import Charter
from policies.vaults import vault_place

T = TypeVar("T")
TURN_SECONDS: Final = 0.1
"""How long one process goes on deciding over a resource before it lets another."""
TOGETHER: Final = 16
"""For how many that wait is decided at once."""

Authorise = Callable[[Session | None], Session]
"""Checks a call against its session and returns the session's next form; raises Refused or Unusable."""
Seal = Callable[[Session, bytes, int], Any]
"""Seals a value (with its deposit's serial) to the session's guest, by the protocol's own means."""


@dataclass(frozen=True, slots=True)
class Released:
    """A resource, sealed to its guest; `state` is a vault's, whose key was released."""

    sealed: Any
    serial: int
    session: Session
    receipt: Receipt
    entry: bytes
    state: VaultState | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request for a resource, in a session that may make it; `epoch` is that in which a vault is opened."""

    session: Session
    ear: Ear
    resource: str
    job: Mapping[str, Any] | None
    digest: str
    charter: Charter
    at: datetime
    authorise: Authorise
    seal: Seal
    epoch: int | None = None


@dataclass(slots=True, eq=False)
class _Flight:
    """A release on its way to the disk; `number` is its entry's, once the writer has given it one."""

    guest: str
    boot: str
    number: int | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """What is released: under which name it is kept, the serial of its deposit, and generation and index of a share;
    of a vault's key what was known of the vault, and its state afterwards."""

    kept: str
    serial: int
    share: tuple[int, int] | None
    seen: Sight | None = None
    state: VaultState | None = None


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a decision is made over: what policies see, and what of the resource is here, under which name."""

    question: ReleaseQuestion
    seen: Sight | None
    kept: str
    stored: StoredResource | None


@dataclass(frozen=True, slots=True)
class _Decision:
    """What was decided, and over what; `sealed` if there are no reasons against it."""

    question: ReleaseQuestion
    reasons: tuple[str, ...]
    sealed: Any
    found: _Found


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request whose turn has yet to come; then its decision on its way to the disk, or why there is none."""

    request: Request
    flight: _Flight
    decision: _Decision | None = None
    pending: asyncio.Future[tuple[bytes | None, tuple[Receipt, ...]]] | None = None
    problem: Exception | None = None


@dataclass(slots=True)
class _Gate:
    """The order of decisions over one resource."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: list[_Waiting] = field(default_factory=list)
    flights: list[_Flight] = field(default_factory=list)
    users: int = 0
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    give_up: Callable[[], None] | None = None
    """Gives up this process's turn, if it has one."""
    since: float = 0.0


class Releases:
    """Decides over releases and writes them down."""

    def __init__(
        self, storage: Storage, kek: KeyEncryption, still_followed: Callable[[Transaction, Charter], bool]
    ) -> None:
        self._storage = storage
        self._kek = kek
        self._still_followed = still_followed
        self._gates: dict[str, _Gate] = {}
        self._turns = asyncio.Semaphore(TURNS)
        self._waiters = ThreadPoolExecutor(TURNS, "turn")  # of their own: who decides must not wait for who waits

    async def decide(self, request: Request) -> Released | None:
        """Release, or raise ReleaseRefused with every reason; None if it has to be decided anew (charter, counters)."""
        async with self._gate(request.resource) as gate:
            mine = _Waiting(request, _Flight(journal.place(request.ear.subject), boot_of(request.ear)))
            gate.waiting.append(mine)
            try:
                async with gate.lock:
                    if mine in gate.waiting:  # else who came before has decided for it too
                        await self._turn(gate, request.resource)
                        await self._decide_together(gate)
            finally:
                if mine in gate.waiting:
                    gate.waiting.remove(mine)
            if mine.problem is not None or mine.decision is None or mine.pending is None:
                raise mine.problem or BrokerUnavailable("nothing was decided", where=request.resource)
            decision, (entry, receipts) = mine.decision, await mine.pending
        if entry is None:
            return None
        if decision.reasons:
            raise ReleaseRefused(decision.reasons, resource=request.resource)
        found = decision.found
        return Released(decision.sealed, found.serial, request.session, receipts[0], entry, found.state)

    async def _decide_together(self, gate: _Gate) -> None:
        """Decide, one after another, for those who wait, and hand what was decided to the writer in that order."""
        charter = gate.waiting[0].request.charter
        batch = [one for one in gate.waiting[:TOGETHER] if one.request.charter is charter]
        decided = await asyncio.to_thread(self._prepare_all, batch, gate)
        for one, outcome in zip(batch, decided, strict=True):
            if one not in gate.waiting:
                continue  # its caller has gone
            gate.waiting.remove(one)
            if isinstance(outcome, Exception):
                one.problem = outcome
                continue
            one.decision = outcome
            try:
                one.pending = self._storage.submit(
                    partial(self._write, request=one.request, decision=outcome, flight=one.flight)
                )
            except BrokerUnavailable as error:
                one.problem = error
                continue
            if not outcome.reasons:
                gate.flights.append(one.flight)
                gate.landed.clear()
                one.pending.add_done_callback(partial(_land, gate, one.flight))

    def _prepare_all(self, batch: Sequence[_Waiting], gate: _Gate) -> list[_Decision | Exception]:
        """Decide for each, counting what was decided before it. Runs beside the event loop, once at a time for a
        resource.

        Each is looked at as if all before it had the outcome of the last, and the policies are asked for all at once:
        that takes little longer than for one. After the first with another outcome the rest is looked at again.
        """
        decided: list[_Decision | Exception] = []
        flights, expected = list(gate.flights), True
        while left := batch[len(decided) :]:
            seen, coming = list[_Looked | Exception](), list(flights)
            for one in left:
                seen.append(_caught(partial(self._look, one.request, coming)))
                coming += [one.flight] if expected else []
            questions = [one.question for one in seen if isinstance(one, _Looked)]
            charter, resource = left[0].request.charter, left[0].request.resource
            floor, owner = charter.policy("floor.rego"), charter.release_policy(resource)
            reasons = iter(
                decide_releases(
                    questions,
                    None if floor is None else floor_rules(floor),
                    None if owner is None else owner_rules(owner),
                )
            )
            for one, looked in zip(left, seen, strict=True):
                outcome: _Decision | Exception
                if isinstance(looked, _Looked):
                    outcome = _caught(partial(self._judge, one.request, looked, next(reasons)))
                else:
                    outcome = looked
                decided.append(outcome)
                released = isinstance(outcome, _Decision) and not outcome.reasons
                flights += [one.flight] if released else []
                if released != expected:
                    expected = released
                    break
        return decided

    @asynccontextmanager
    async def _gate(self, resource: str) -> AsyncIterator[_Gate]:
        gate = self._gates.setdefault(resource, _Gate())
        gate.users += 1
        try:
            yield gate
        finally:
            gate.users -= 1
            if gate.users == 0:
                self._gates.pop(resource, None)
                await self._end_turn(gate)

    async def _turn(self, gate: _Gate, resource: str) -> None:
        """Have this process's turn over the resource, a new one if the last has taken long enough."""
        if not self._storage.database.shared:
            return
        if gate.give_up is not None and time.monotonic() - gate.since > TURN_SECONDS:
            if gate.flights:
                await gate.landed.wait()
            await self._end_turn(gate)
        if gate.give_up is None:
            await self._turns.acquire()
            loop = asyncio.get_running_loop()
            try:
                taken = await loop.run_in_executor(self._waiters, self._storage.database.take_turn, resource)
            except BaseException:
                self._turns.release()
                raise
            gate.give_up, gate.since = taken, time.monotonic()

    async def _end_turn(self, gate: _Gate) -> None:
        give_up, gate.give_up = gate.give_up, None
        if give_up is not None:
            try:
                await asyncio.to_thread(give_up)
            finally:
                self._turns.release()

    def _look(self, request: Request, flights: Sequence[_Flight]) -> _Looked:
        """What the decision is made over. Raises ReleaseRefused, BrokerUnavailable."""
        ear, charter, resource = request.ear, request.charter, request.resource
        split = charter.split(resource)

        def read(step: Transaction) -> tuple[Counters, Sight | None, str, StoredResource | None]:
            seen, part = _seen(step, request), 0 if split is None else split.generation
            if seen is not None and seen.state.deal is not None:
                part = seen.state.deal.number
            kept = kept_as(resource, part)
            return _counters(step, resource, ear, flights), seen, kept, step.resource(kept)

        counters, seen, kept, stored = self._storage.read(read)
        enrolment = charter.enrolment(ear.subject.role, ear.subject.name)
        if enrolment is None:
            raise ReleaseRefused(("the guest's place is no longer enrolled",), resource=resource)
        age, protocol = age_seconds(request.session, request.at), request.session.protocol
        question = ReleaseQuestion(resource, ear, enrolment, age, protocol, request.job, counters, request.at)
        return _Looked(question, seen, kept, stored)

    def _judge(self, request: Request, looked: _Looked, reasons: tuple[str, ...]) -> _Decision:
        """The decision, with the value sealed if it is released. Raises BrokerUnavailable."""
        resource, split, seen = request.resource, request.charter.split(request.resource), looked.seen
        state, stored = None, looked.stored
        if seen is not None:
            against, state = _opening(request, seen)
            reasons += against
        if stored is None:
            reasons += (not_deposited(resource),)
        if split is not None and request.session.protocol == "kbs":
            reasons += (f"{resource} is split, and the KBS protocol joins no shares",)
        if reasons or stored is None:
            return _Decision(looked.question, reasons, None, _Found(looked.kept, 0, None, seen))
        value = open_resource(stored, self._kek)
        share = None if split is None else (split.generation, parse_share(value).index)
        found = _Found(looked.kept, stored.serial, share, seen, state)
        return _Decision(looked.question, (), request.seal(request.session, value, stored.serial), found)

    def _write(
        self,
        step: Transaction,
        request: Request,
        decision: _Decision,
        flight: _Flight,
    ) -> bytes | None:
        """Write the decision down if everything that it was made over still stands; else None."""
        question, reasons, found = decision.question, decision.reasons, decision.found
        used = request.authorise(step.session(request.session.id))
        if not self._still_followed(step, request.charter):
            return None
        if (_counters(step, request.resource, request.ear, ()), _seen(step, request)) != (
            question.counters,
            found.seen,
        ):
            return None
        if not reasons:
            stored = step.resource(found.kept)
            if stored is None or stored.serial != found.serial:
                return None
            opening = None if found.state is None else {"epoch": request.epoch, "state": found.state.to_json()}
            note = journal.release(
                question,
                used,
                request.charter,
                serial=found.serial,
                request=request.digest,
                share=found.share,
                opening=opening,
            )
        else:
            note = journal.release_denial(question, used, request.charter, reasons, request.epoch)
        step.update_session(used)
        flight.number = journal.append(step, note)
        return note.entry.to_bytes()


def _caught(work: Callable[[], T]) -> T | Exception:
    """What comes of `work`, or what it raises, which is its own caller's to hear."""
    try:
        return work()
    except Exception as error:
        return error


def _land(gate: _Gate, flight: _Flight, _pending: asyncio.Future[Any]) -> None:
    gate.flights.remove(flight)
    if not gate.flights:
        gate.landed.set()


def _seen(step: Transaction, request: Request) -> Sight | None:
    """What the ledger says of the vault whose key is asked for; None for any other resource."""
    if vault_place(request.resource) is None:
        return None
    return sight(step, request.resource, boot_of(request.ear), request.charter)


def _opening(request: Request, seen: Sight) -> tuple[tuple[str, ...], VaultState]:
    """What is against opening a vault, and its state afterwards."""
    if request.epoch is None:
        return (not_opening(request.resource),), seen.state
    return opening_outcome(request.resource, request.ear, request.epoch, seen.state, seen.held, request.charter)


def not_opening(vault: str) -> str:
    """What is against a release of a vault's key that does not open the vault."""
    return f"{vault} is a vault's key: its guest opens the vault"


def opening_outcome(
    vault: str, ear: Ear, epoch: int, state: VaultState, held: bool, charter: Charter
) -> tuple[tuple[str, ...], VaultState]:
    """Every reason against giving a vault's key to a guest in this epoch, policies apart; and the state after it."""
    subject, claim = ear.subject, Claim(boot_of(ear), epoch, held)
    against = place_reasons(vault, subject.role, subject.name, subject.member, charter)
    return (*against, *open_reasons(vault, state, claim)), opened(state, claim)


def _counters(step: Transaction, resource: str, ear: Ear, flights: Sequence[_Flight]) -> Counters:
    """The ledger's counts, and of the releases on their way those that this snapshot of it does not have yet."""
    guest, boot, size = journal.place(ear.subject), boot_of(ear), step.size()
    coming = [flight for flight in list(flights) if flight.number is None or flight.number >= size]
    return Counters(
        releases=step.count("release", resource=resource) + len(coming),
        releases_to_guest=step.count("release", resource=resource, guest=guest)
        + sum(flight.guest == guest for flight in coming),
        releases_this_boot=step.count("release", resource=resource, boot=boot)
        + sum(flight.boot == boot for flight in coming),
    )
