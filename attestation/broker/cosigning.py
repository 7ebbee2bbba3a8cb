"""Getting the ledger's head cosigned before anything that it commits to is answered (DESIGN.md section 5, step 5).

Rounds: the newest head goes to all witnesses at once; when as many as the charter demands have cosigned it, every
answer that waits for an entry below it may leave, and the next round begins with whatever head there is by then. The
writer commits on meanwhile, so a round serves all that came during the one before it. Who is slow delays nobody: a
witness that is still busy with an older round goes on with the newest one when it is done.

A round fails when too few are left that could cosign, or after ROUND_SECONDS: then the answers that waited for it are
refusals that name each witness and its reason, while their entries stay in the ledger, where counters count them.
Nothing is remembered of a failure but for telling it: the next round asks anew.

What is cosigned is the head in the database, whichever process committed it, and a head that another process got
cosigned is as good as an own one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from attestation.broker.transaction import Head, Transaction
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.ledger.checkpoint import Checkpoint, NoteSignature, open_checkpoint
from attestation.ledger.cosignature import Ledger, ledger_of, open_cosigned
from attestation.ledger.witness import AddCheckpoint
from attestation.witness.client import Behind, WitnessClient, WitnessRefusal
from policies.documents import BrokerEntry, Consortium
from policies.errors import SealwrightError

ROUND_SECONDS: Final = 4.0
"""How long a round may take; an answer waits for two of them at most, which is less than its guest waits for it."""
GATHER_SECONDS: Final = 0.02
"""From the start of one round to that of the next, at least: what comes meanwhile shares it."""
LINGER_SECONDS: Final = 0.5
"""How long a round that has failed waits for what the other witnesses say."""
RETRY_SECONDS: Final = 2.0
"""How long after a failed round the next one begins if nobody asks."""
TRIES: Final = 4
"""How often a witness is asked in one round because it stands elsewhere than was thought."""

Settle = Callable[["Head | BrokerUnavailable"], None]
"""Hears the cosigned head, or why there is none. It must not raise."""


class Read(Protocol):
    """Reads the database (attestation.broker.storage.Storage.read)."""

    def __call__(self, work: Callable[[Transaction], Any], /) -> Any:
        """Run `work`. Raises BrokerUnavailable."""


class _Superseded:
    """A witness has cosigned a newer head of this ledger: another process's."""


@dataclass(slots=True, eq=False)
class _Round:
    """One head on its way to the witnesses."""

    head: Head
    checkpoint: Checkpoint
    cosigned: dict[str, NoteSignature] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    superseded: bool = False


@dataclass(slots=True, eq=False)
class _Waiting:
    """What waits until the first `size` entries are cosigned; `steps` is how many answers that are."""

    size: int
    steps: int
    settle: Settle
    since: float


@dataclass(slots=True, eq=False)
class _Asker:
    """One witness, and the size of this ledger that it has cosigned, as far as is known."""

    client: WitnessClient
    done: _Round | None = None
    size: int = 0

    @property
    def name(self) -> str:
        return self.client.entry.name

    def ask(self, round_: _Round, read: Read) -> NoteSignature | WitnessRefusal | _Superseded:
        """Ask for the cosignature of a round's head, from wherever the witness stands. It blocks."""
        new = round_.checkpoint
        for _ in range(TRIES):
            if self.size > new.size:
                here = int(read(lambda step: step.head().size))
                return _Superseded() if self.size <= here else self._ahead(here)
            proof = () if self.size == 0 else tuple(read(lambda step: step.consistency(self.size, new.size)))
            answer = self.client.add(AddCheckpoint(self.size, proof, round_.head.checkpoint), new)
            if not isinstance(answer, Behind):
                self.size = new.size if isinstance(answer, NoteSignature) else self.size
                return answer
            if answer.size == self.size:
                return self._refusal(f"it cosigned another tree of {self.size} entries: this ledger was forked")
            self.size = answer.size
        return self._refusal("what it cosigned last changes with every question")

    def _ahead(self, here: int) -> WitnessRefusal:
        size, self.size = self.size, 0  # ask anew next time: what it said is not signed
        return self._refusal(
            f"it cosigned {size} entries of this ledger, which has {here}: an older database was put in place, or "
            "another broker runs with this one's key"
        )

    def _refusal(self, reason: str) -> WitnessRefusal:
        return WitnessRefusal(f"witness {self.name}: {reason}")


@dataclass(frozen=True, slots=True, eq=False)
class _Demand:
    """What the charter demands: the ledger with its threshold, and whom to ask."""

    ledger: Ledger
    askers: tuple[_Asker, ...]
    entries: tuple[Any, ...]


class Cosigner:
    """Gets one ledger's heads cosigned. Thread-safe; it does nothing until a charter that demands it is followed."""

    def __init__(self, read: Read, publish: Callable[[Head | None], None]) -> None:
        """`publish` keeps a cosigned head (None: forget that there is one); it must neither block nor raise."""
        self._read = read
        self._publish = publish
        self._changed = threading.Condition()
        self._demand: _Demand | None = None
        self._waiting: list[_Waiting] = []
        self._round: _Round | None = None
        self._stirred = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    @property
    def demanded(self) -> bool:
        """Whether answers wait for cosignatures."""
        return self._demand is not None

    @property
    def waiting(self) -> int:
        """How many answers wait."""
        with self._changed:
            return sum(one.steps for one in self._waiting)

    @property
    def problem(self) -> str | None:
        """Why the ledger's head is not cosigned, if it is not; until the first round is over, that it is not yet."""
        return self._problem if self.demanded else None

    def follow(self, consortium: Consortium, broker: BrokerEntry) -> None:
        """Do what this charter demands of this broker's ledger from now on."""
        ledger, witnesses = ledger_of(consortium, broker), consortium.witnesses_of(broker)
        with self._changed:
            if self._demand is not None and (self._demand.ledger, self._demand.entries) == (ledger, witnesses):
                return
            if self._demand is not None:
                for asker in self._demand.askers:
                    asker.client.close()
            self._demand = None
            if ledger.threshold:
                clients = (WitnessClient(one, consortium.trust_domain, timeout=ROUND_SECONDS) for one in witnesses)
                self._demand = _Demand(ledger, tuple(map(_Asker, clients)), witnesses)
                self._problem = "the ledger's head is not cosigned yet"
            else:
                self._publish(None)
            self._stirred = True
            if self._demand is not None:
                for asker in self._demand.askers:
                    self._start(self._ask, f"witness {asker.name}", asker, self._demand)
                if self._thread is None:
                    self._thread = self._start(self._run, "cosigner")
            self._changed.notify_all()

    def wait(self, size: int, steps: int, settle: Settle) -> None:
        """Tell `settle` when the first `size` entries are cosigned, or that they are not."""
        with self._changed:
            if not self._closed:
                self._waiting.append(_Waiting(size, steps, settle, time.monotonic()))
                self._stirred = True
                self._changed.notify_all()
                return
        settle(_ending())

    def stir(self) -> None:
        """There is a new head for which nobody waits: have it cosigned."""
        with self._changed:
            self._stirred = True
            self._changed.notify_all()

    def close(self) -> None:
        """End; what waits hears that the broker ends."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
            demand, self._demand = self._demand, None
            self._changed.notify_all()
        for one in left:
            one.settle(_ending())
        if self._thread is not None:
            self._thread.join(timeout=ROUND_SECONDS)
        for asker in demand.askers if demand else ():
            asker.client.close()

    # --- the rounds ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        begun = 0.0
        while True:
            with self._changed:
                patience = RETRY_SECONDS if self._demand is not None and self._problem is not None else None
                self._changed.wait_for(lambda: self._stirred or self._closed, timeout=patience)
                self._changed.wait_for(lambda: self._closed, timeout=begun + GATHER_SECONDS - time.monotonic())
                if self._closed:
                    return
                self._stirred = False
                demand, begun = self._demand, time.monotonic()
            try:
                head, published = self._read(lambda step: (step.head(), step.published()))
                if demand is None or head.size == 0:
                    self._settle(head)
                elif self._problem is None and self._enough(published, head, demand.ledger):
                    self._settle(published)
                else:
                    self._cosign(demand, head)
            except SealwrightError as error:
                self._fail(BrokerUnavailable(error.what, where="witnesses"))
            except Exception as error:  # whatever it is, those who wait must hear it, and the next round comes
                self._fail(BrokerUnavailable(f"the cosigner has a fault: {type(error).__name__}", where="witnesses"))

    def _cosign(self, demand: _Demand, head: Head) -> None:
        """One round."""
        try:
            opened = open_checkpoint(head.checkpoint, demand.ledger.origin, demand.ledger.key)
        except LedgerRefused as error:  # the commit that goes over to the charter's new key is still to come
            self._postpone(error.what)
            return
        round_, needed = _Round(head, opened), demand.ledger.threshold
        others = len(demand.askers) - needed

        def over() -> bool:
            moved_on = self._closed or self._demand is not demand or round_.superseded
            return len(round_.cosigned) >= needed or len(round_.refused) > others or moved_on

        def told() -> bool:
            return over() and len(round_.cosigned) + len(round_.refused) == len(demand.askers)

        with self._changed:
            self._round = round_
            self._changed.notify_all()
            timely = self._changed.wait_for(over, timeout=ROUND_SECONDS)
            if (
                timely and len(round_.refused) > others
            ):  # it has failed; what the others would have said is worth a word
                self._changed.wait_for(told, timeout=LINGER_SECONDS)
            self._round = None
            if self._demand is not demand:
                self._stirred = True  # another charter was followed meanwhile: begin anew under it
                return
            cosigned, refused, superseded = dict(round_.cosigned), dict(round_.refused), round_.superseded
        if len(cosigned) >= needed:
            lines = "".join(cosigned[asker.name].line() for asker in demand.askers if asker.name in cosigned)
            done = Head(head.size, head.checkpoint + lines)
            self._publish(done)
            self._settle(done)
        elif superseded:
            self._postpone(None)
        else:
            silent = f"did not answer in {ROUND_SECONDS if not timely else LINGER_SECONDS:g} s"
            reasons = tuple(
                refused.get(asker.name, f"witness {asker.name} {silent}")
                for asker in demand.askers
                if asker.name not in cosigned
            )
            words = f"{len(cosigned)} of the {needed} witnesses that have to cosign the ledger did"
            self._fail(
                BrokerUnavailable(f"{words}: {'; '.join(reasons)}", where="witnesses", reasons=(words, *reasons)),
                below=head.size,
            )

    def _enough(self, published: Head, head: Head, ledger: Ledger) -> bool:
        """Whether a head that is cosigned already, by another process's doing, is all that is waited for."""
        with self._changed:
            needed = max((one.size for one in self._waiting), default=head.size)
        return published.size >= needed and _cosigned(published, ledger)

    def _settle(self, head: Head) -> None:
        """Tell all that waits for this head."""
        with self._changed:
            self._problem = None
            ready = [one for one in self._waiting if one.size <= head.size]
            self._waiting = [one for one in self._waiting if one.size > head.size]
            self._stirred = self._stirred or bool(self._waiting)
        for one in ready:
            one.settle(head)

    def _fail(self, error: BrokerUnavailable, *, below: int | None = None) -> None:
        """Tell all that waits for a head that failed (None: all that waits)."""
        with self._changed:
            self._problem = error.what
            failed = [one for one in self._waiting if below is None or one.size <= below]
            self._waiting = [one for one in self._waiting if one not in failed]
            self._stirred = self._stirred or bool(self._waiting)
        for one in failed:
            one.settle(error)

    def _postpone(self, why: str | None) -> None:
        """Begin anew for those who wait, of whom nobody waits for ever: other processes' heads may overtake ours."""
        with self._changed:
            self._problem = why or self._problem
            now = time.monotonic()
            failed = [one for one in self._waiting if now - one.since > 2 * ROUND_SECONDS]
            self._waiting = [one for one in self._waiting if one not in failed]
            self._stirred = self._stirred or bool(self._waiting)
        for one in failed:
            one.settle(BrokerUnavailable(why or "the ledger grows faster than it is cosigned", where="witnesses"))

    def _ask(self, asker: _Asker, demand: _Demand) -> None:
        """One witness's thread: the newest round, again and again."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._demand is not demand or self._round not in (None, asker.done))
                round_ = self._round
                if self._demand is not demand or round_ is None:
                    return
            try:
                answer = asker.ask(round_, self._read)
            except SealwrightError as error:
                answer = WitnessRefusal(f"witness {asker.name} cannot be asked: {error.what}")
            except Exception as error:  # a fault of ours is told like any other reason
                answer = WitnessRefusal(f"witness {asker.name} cannot be asked: {type(error).__name__}")
            with self._changed:
                asker.done = round_
                if isinstance(answer, NoteSignature):
                    round_.cosigned[asker.name] = answer
                elif isinstance(answer, WitnessRefusal):
                    round_.refused[asker.name] = answer.reason
                else:
                    round_.superseded = True
                self._changed.notify_all()

    @staticmethod
    def _start(work: Callable[..., None], name: str, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, args=arguments, daemon=True)
        thread.start()
        return thread


def _cosigned(head: Head, ledger: Ledger) -> bool:
    """Whether a head from the database is cosigned as this charter demands."""
    try:
        return bool(head.checkpoint) and open_cosigned(head.checkpoint, ledger).size == head.size
    except SealwrightError:
        return False


def _ending() -> BrokerUnavailable:
    return BrokerUnavailable("the broker ends", where="witnesses")
