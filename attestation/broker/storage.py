"""The broker's database: the ledger, its blobs, sessions, resources. SQLAlchemy Core over SQLite or PostgreSQL.

One writer thread runs transactions in batches: each is a function of a `Transaction` run in a savepoint of its own,
and all of a batch are committed together, with one signed checkpoint, before any of their answers leaves. So an entry
is durable when its caller hears of it, a batch costs one fsync, and a decision, its ledger entry and its counters are
one atomic step. Where the charter demands it, witnesses have cosigned a head above it too
(attestation.broker.cosigning).

Several processes may write to one PostgreSQL database: each batch begins by waiting for the others' (Database), then
reads size, head and the signing key in force from the database. Nothing of the ledger is remembered between batches
but how far it was: a database that is shorter than that is an older one, and is not written to.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from attestation.broker.cosigning import Cosigner
from attestation.broker.database import BUSY_SECONDS, Database, open_database, reading, words, writing
from attestation.broker.schema import check_schema, make_schema
from attestation.broker.sessions import Session
from attestation.broker.transaction import Head, Memory
from attestation.broker.transaction import StoredResource as StoredResource
from attestation.broker.transaction import Transaction as Transaction
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.ledger.checkpoint import Checkpoint, open_checkpoint, sign_checkpoint
from attestation.ledger.receipt import Receipt
from attestation.ledger.tree import root_hash
from policies.errors import Unusable

T = TypeVar("T")
BATCH: Final = 64
QUEUE: Final = 1024
Trusted = Callable[[Transaction], Iterable[Ed25519PublicKey]]
"""Finds in a database the keys of which one must have signed its ledger's head."""


@dataclass(slots=True)
class _Step(Generic[T]):
    work: Callable[[Transaction], T]
    done: Future[tuple[T, tuple[Receipt, ...]]]
    cosigned: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """What came of a step: its result and the entries that it appended, or what it raised."""

    step: _Step[Any]
    result: Any
    appended: list[int]
    problem: BaseException | None


class Storage:
    """The database of one broker. Open it with `open_storage`; close it."""

    def __init__(self, database: Database, origin: str, keys: Iterable[Ed25519PrivateKey], size: int) -> None:
        """`keys`: the broker's signing key, then those that may take its place. `size`: of the ledger, as checked."""
        self.database = database
        self._origin = origin
        self._keys = {key_name(key.public_key()): key for key in keys}
        self._first = next(iter(self._keys))
        self._seen = size
        self._memory = Memory(sole=not database.shared)
        self._connection: sa.Connection | None = None
        self._steps: queue.Queue[_Step[Any] | None] = queue.Queue(QUEUE)
        self.cosigner = Cosigner(self.read, self._publish)
        self._writer = threading.Thread(target=self._write, name="ledger-writer", daemon=True)
        self._writer.start()

    async def transact(
        self, work: Callable[[Transaction], T], *, cosigned: bool = True
    ) -> tuple[T, tuple[Receipt, ...]]:
        """Run `work` in a transaction; return its result and the receipts of what it appended, once durable.

        What was appended is cosigned first if the charter demands it (not with `cosigned` False: for what is told to
        nobody). What `work` raises comes back, and nothing of it is kept. Raises BrokerUnavailable if the database
        cannot be written or too much waits for it; or if too few witnesses cosigned: then the entries stay.
        """
        return await self.submit(work, cosigned=cosigned)

    def submit(
        self, work: Callable[[Transaction], T], *, cosigned: bool = True
    ) -> asyncio.Future[tuple[T, tuple[Receipt, ...]]]:
        """Like `transact`, but it takes its place in the writer's order at once, whenever it is awaited."""
        return asyncio.wrap_future(self._submit(work, cosigned=cosigned))

    def transact_now(self, work: Callable[[Transaction], T]) -> tuple[T, tuple[Receipt, ...]]:
        """Like `transact`, for a caller that may block."""
        return self._submit(work).result(timeout=4 * BUSY_SECONDS)

    def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work`, which only reads, on the calling thread. Raises BrokerUnavailable."""
        with reading(self.database) as connection:
            return work(Transaction(connection, self._memory))

    async def look(self, work: Callable[[Transaction], T]) -> T:
        """Like `read`, for the event loop: a database on a network must not hold it up."""
        return await asyncio.to_thread(self.read, work) if self.database.shared else self.read(work)

    async def session(self, identifier: str) -> Session | None:
        """A session as it was committed last, or None. Raises BrokerUnavailable."""
        remembered = self._memory.sessions.get(identifier)
        return remembered or await self.look(lambda step: step.session(identifier))

    def add_key(self, key: Ed25519PrivateKey) -> None:
        """Have a further signing key at hand, for when a step puts it in force (Transaction.set_signing_key)."""
        self._keys = {**self._keys, key_name(key.public_key()): key}

    def close(self) -> None:
        """Finish what waits and close the database."""
        if self._writer.is_alive():
            self._steps.put(None)
            self._writer.join(timeout=4 * BUSY_SECONDS)
        self.cosigner.close()
        self.database.dispose()

    def _submit(
        self, work: Callable[[Transaction], T], *, cosigned: bool = True
    ) -> Future[tuple[T, tuple[Receipt, ...]]]:
        if cosigned and self.cosigner.waiting >= QUEUE:
            raise BrokerUnavailable(f"{QUEUE} answers wait for the ledger's witnesses", where="witnesses")
        step: _Step[T] = _Step(work, Future(), cosigned)
        try:
            self._steps.put_nowait(step)
        except queue.Full as error:
            raise BrokerUnavailable(f"{QUEUE} requests wait for the database", where="database") from error
        return step.done

    def _write(self) -> None:
        ending = False
        while not ending:
            first = self._steps.get()
            batch = [first] if first is not None else []
            ending = first is None
            while not ending and len(batch) < BATCH:
                try:
                    more = self._steps.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    ending = True
                else:
                    batch.append(more)
            if batch:
                self._commit(batch)
        self._hang_up()

    def _commit(self, batch: list[_Step[Any]]) -> None:
        """Run and commit a batch, then tell each caller."""
        batch = [step for step in batch if step.done.set_running_or_notify_cancel()]
        outcomes: list[_Outcome] = []
        try:
            self.database.check()
            connection = self._writing()
            transaction = Transaction(connection, self._memory)
            if transaction.size() < self._seen:
                raise FileNotFoundError(f"an older one was put in its place, without entry {self._seen - 1}")
            outcomes.extend(self._run(transaction, step) for step in batch)
            head = transaction.head()
            grown = any(one.appended for one in outcomes)
            if grown:
                size = transaction.size()
                checkpoint = Checkpoint(self._origin, size, root_hash(size, transaction.node))
                head = Head(size, sign_checkpoint(checkpoint, self._key(transaction)))
                transaction.set_head(head)
            later = [one for one in outcomes if one.appended and one.step.cosigned and self.cosigner.demanded]
            now = [one for one in outcomes if one not in later]
            receipts = [_receipts(transaction, one, head) for one in now]
            written = transaction.flush()
            connection.exec_driver_sql("COMMIT")
            self._memory.keep(written)
        except Exception as error:  # whatever it is, each waiting caller must hear that nothing was kept
            self._hang_up()
            failure = BrokerUnavailable(f"the database cannot be written: {words(error)}", where="database")
            failure.__cause__ = error
            for step in batch:
                step.done.set_exception(failure)
            return
        self._seen = head.size
        if later:
            self.cosigner.wait(head.size, len(later), partial(self._answer, later))
        elif grown:
            self.cosigner.stir()
        for one, proofs in zip(now, receipts, strict=True):
            _tell(one, proofs)

    def _writing(self) -> sa.Connection:
        """The writer's connection, in a transaction."""
        if self._connection is None:
            self._connection = self.database.engine.connect()
            self.database.attend(self._connection)
        self.database.begin_write(self._connection)
        return self._connection

    def _hang_up(self) -> None:
        """Give up the writer's connection, its transaction and its locks."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sa.exc.SQLAlchemyError):
                connection.invalidate()
            connection.close()

    def _key(self, transaction: Transaction) -> Ed25519PrivateKey:
        name = transaction.signing_key() or self._first
        if name not in self._keys:
            raise LedgerRefused(("the broker's signing key was rotated, and this process has the old one",), where=name)
        return self._keys[name]

    def _answer(self, outcomes: list[_Outcome], found: Head | BrokerUnavailable) -> None:
        """Tell the callers whose entries a cosigned head has, or why there is none."""
        if isinstance(found, Head):
            head = found
            try:
                receipts = self.read(lambda step: [_receipts(step, one, head) for one in outcomes])
            except BrokerUnavailable as error:
                found = error
            else:
                for one, proofs in zip(outcomes, receipts, strict=True):
                    _tell(one, proofs)
                return
        for one in outcomes:
            one.step.done.set_exception(found)

    def _publish(self, head: Head | None) -> None:
        """Keep a cosigned head with the next commit; if the writer is too busy, a later head will be kept."""
        with suppress(BrokerUnavailable):
            self._submit(lambda step: step.publish(head), cosigned=False)

    @staticmethod
    def _run(transaction: Transaction, step: _Step[Any]) -> _Outcome:
        transaction.begin_step()
        try:
            result = step.work(transaction)
        except (sa.exc.DataError, sa.exc.IntegrityError) as error:  # what this step wanted to write
            transaction.undo()
            return _Outcome(step, None, [], BrokerUnavailable(f"it cannot be kept: {words(error)}", where="database"))
        except sa.exc.SQLAlchemyError:
            raise  # the database itself: the whole batch fails
        except Exception as problem:  # goes to the caller that asked, by its future
            transaction.undo()
            return _Outcome(step, None, [], problem)
        transaction.keep()
        return _Outcome(step, result, transaction.appended, None)


def _receipts(transaction: Transaction, outcome: _Outcome, head: Head) -> tuple[Receipt, ...]:
    return tuple(transaction.receipt(number, head) for number in outcome.appended)


def _tell(outcome: _Outcome, receipts: tuple[Receipt, ...]) -> None:
    if outcome.problem is not None:
        outcome.step.done.set_exception(outcome.problem)
    else:
        outcome.step.done.set_result((outcome.result, receipts))


def key_name(key: Ed25519PublicKey) -> str:
    """Which signing key it is, as the database has it: its 32 bytes in hex."""
    return key.public_bytes_raw().hex()


def open_storage(
    url: str,
    origin: str,
    key: Ed25519PrivateKey,
    *,
    others: Iterable[Ed25519PrivateKey] = (),
    password: str | None = None,
    trusted: Trusted | None = None,
    busy_seconds: float = BUSY_SECONDS,
) -> Storage:
    """Open the database at `url` (see open_database), making its tables if it is new, and check its ledger's head.

    `others` are further signing keys of this broker's (see add_key); `trusted` finds whose signature counts (default:
    that of `key`). Raises Unusable for a database of another kind or schema, BrokerUnavailable if it cannot be opened,
    LedgerRefused if its head is not signed for `origin` by one of those keys, or is not its tree's.
    """
    database = open_database(url, password=password, busy_seconds=busy_seconds)
    try:
        with writing(database) as connection:
            transaction = Transaction(connection)
            if make_schema(connection):
                transaction.set_origin(origin)
            check_schema(connection)
            transaction.flush()
            check_head(transaction, origin, trusted(transaction) if trusted else (key.public_key(),))
            size = transaction.size()
    except BaseException:
        database.dispose()
        raise
    return Storage(database, origin, (key, *others), size)


def read_database(source: Path | Database, work: Callable[[Transaction], T]) -> T:
    """Run `work`, which only reads, on a broker's database (or its file), whether its broker runs or not.

    Raises Unusable if there is no such database or it has another schema, BrokerUnavailable if it cannot be read.
    """
    if isinstance(source, Path) and not source.is_file():
        raise Unusable("there is no broker's database", where=str(source), do="Name the broker's folder or database.")
    database = open_database(f"sqlite:///{source.absolute()}", make=False) if isinstance(source, Path) else source
    try:
        with reading(database) as connection:
            check_schema(connection)
            return work(Transaction(connection))
    finally:
        if isinstance(source, Path):
            database.dispose()


def check_head(transaction: Transaction, origin: str, keys: Iterable[Ed25519PublicKey]) -> None:
    """Check that the ledger's signed head, by one of these keys, is its tree's. Raises LedgerRefused."""
    size, head = transaction.size(), transaction.head()
    found = transaction.origin()
    if found != origin:
        raise LedgerRefused((f"the database holds the ledger {found}, not {origin}",), where="database")
    if size == 0 and not head.checkpoint:
        return
    candidates = tuple(keys)
    for one in (head, transaction.published()):
        checkpoint = _opened(one.checkpoint, origin, candidates)
        tree = (one.size, root_hash(one.size, transaction.node) if one.size <= size else b"")
        if (checkpoint.size, checkpoint.root) != tree or (one is head and one.size != size):
            raise LedgerRefused(("the ledger's tree is not the one its head was signed for",), where="database")


def _opened(note: str, origin: str, keys: tuple[Ed25519PublicKey, ...]) -> Checkpoint:
    for key in keys[1:]:
        with suppress(LedgerRefused):
            return open_checkpoint(note, origin, key)
    return open_checkpoint(note, origin, keys[0])
