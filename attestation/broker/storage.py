"""The broker's database: the ledger, its blobs, sessions, resources. SQLAlchemy Core over SQLite.

One writer thread runs transactions in batches: each is a function of a `Transaction` run in a savepoint of its own,
and all of a batch are committed together, with one signed checkpoint, before any of their answers leaves. So an entry
is durable (WAL, synchronous=FULL) when its caller hears of it, a batch costs one fsync, and a decision, its ledger
entry and its counters are one atomic step. Where the charter demands it, witnesses have cosigned a head above it too
(attestation.broker.cosigning).
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.cosigning import Cosigner
from attestation.broker.transaction import METADATA, Head
from attestation.broker.transaction import StoredResource as StoredResource
from attestation.broker.transaction import Transaction as Transaction
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.ledger.checkpoint import Checkpoint, open_checkpoint, sign_checkpoint
from attestation.ledger.receipt import Receipt
from attestation.ledger.tree import root_hash
from policies.errors import Unusable

T = TypeVar("T")
SCHEMA_VERSION: Final = "1"
BATCH: Final = 64
QUEUE: Final = 1024
BUSY_SECONDS: Final = 5
"""How long a transaction waits for a locked database before it is given up."""


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

    def __init__(self, engine: sa.Engine, path: Path, origin: str, key: Ed25519PrivateKey) -> None:
        self._engine = engine
        self._path = path
        self._identity = _identity(path)
        self._origin = origin
        self._key = key
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
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")  # one snapshot for all that `work` reads
                return work(Transaction(connection))
        except sa.exc.SQLAlchemyError as error:
            raise BrokerUnavailable(f"the database cannot be read: {_words(error)}", where="database") from error

    def close(self) -> None:
        """Finish what waits and close the database."""
        if self._writer.is_alive():
            self._steps.put(None)
            self._writer.join(timeout=4 * BUSY_SECONDS)
        self.cosigner.close()
        self._engine.dispose()

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

    def _commit(self, batch: list[_Step[Any]]) -> None:
        """Run and commit a batch, then tell each caller."""
        batch = [step for step in batch if step.done.set_running_or_notify_cancel()]
        outcomes: list[_Outcome] = []
        try:
            if _identity(self._path) != self._identity:  # SQLite would go on writing to a file that nobody can open
                raise FileNotFoundError("its file was removed or replaced")
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                transaction = Transaction(connection)
                outcomes.extend(self._run(connection, transaction, step) for step in batch)
                head = transaction.head()
                grown = any(one.appended for one in outcomes)
                if grown:
                    size = transaction.size()
                    checkpoint = Checkpoint(self._origin, size, root_hash(size, transaction.node))
                    head = Head(size, sign_checkpoint(checkpoint, self._key))
                    transaction.set_head(head)
                later = [one for one in outcomes if one.appended and one.step.cosigned and self.cosigner.demanded]
                now = [one for one in outcomes if one not in later]
                receipts = [_receipts(transaction, one, head) for one in now]
                connection.exec_driver_sql("COMMIT")
        except Exception as error:  # whatever it is, each waiting caller must hear that nothing was kept
            failure = BrokerUnavailable(f"the database cannot be written: {_words(error)}", where="database")
            failure.__cause__ = error
            for step in batch:
                step.done.set_exception(failure)
            return
        if later:
            self.cosigner.wait(head.size, len(later), partial(self._answer, later))
        elif grown:
            self.cosigner.stir()
        for one, proofs in zip(now, receipts, strict=True):
            _tell(one, proofs)

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
    def _run(connection: sa.Connection, transaction: Transaction, step: _Step[Any]) -> _Outcome:
        transaction.appended = []
        connection.exec_driver_sql("SAVEPOINT step")
        try:
            result = step.work(transaction)
        except sa.exc.SQLAlchemyError:
            raise  # the database itself: the whole batch fails
        except Exception as problem:  # goes to the caller that asked, by its future
            connection.exec_driver_sql("ROLLBACK TO step")
            connection.exec_driver_sql("RELEASE step")
            return _Outcome(step, None, [], problem)
        connection.exec_driver_sql("RELEASE step")
        return _Outcome(step, result, transaction.appended, None)


def _receipts(transaction: Transaction, outcome: _Outcome, head: Head) -> tuple[Receipt, ...]:
    return tuple(transaction.receipt(number, head) for number in outcome.appended)


def _tell(outcome: _Outcome, receipts: tuple[Receipt, ...]) -> None:
    if outcome.problem is not None:
        outcome.step.done.set_exception(outcome.problem)
    else:
        outcome.step.done.set_result((outcome.result, receipts))


def _words(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause).splitlines()[0][:200] if str(cause) else type(cause).__name__


def open_storage(url: str, origin: str, key: Ed25519PrivateKey, *, busy_seconds: float = BUSY_SECONDS) -> Storage:
    """Open the database at `url` (`sqlite:////absolute/path`), making it if it is new, and check its ledger's head.

    Raises Unusable for a database of another kind, BrokerUnavailable if it cannot be opened, LedgerRefused if its head
    is not signed by `key` for `origin` or is not its tree's.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise Unusable(f"{parsed.get_backend_name()} is no database of ours", where="database", do="Give a sqlite URL.")
    if parsed.database:
        _private_file(Path(parsed.database))
    engine = sa.create_engine(parsed, connect_args={"timeout": busy_seconds, "check_same_thread": False})
    sa.event.listen(engine, "connect", _configure)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            METADATA.create_all(connection)
            transaction = Transaction(connection)
            found, _ = transaction.schema()
            if found is None:
                transaction.set_schema(SCHEMA_VERSION, origin)
            elif found != SCHEMA_VERSION:
                raise Unusable(f"the database has schema {found}", where="database", do="Use the version that made it.")
            check_head(transaction, origin, key)
            connection.exec_driver_sql("COMMIT")
    except sa.exc.SQLAlchemyError as error:
        engine.dispose()
        raise BrokerUnavailable(f"the database cannot be opened: {_words(error)}", where="database") from error
    except BaseException:
        engine.dispose()
        raise
    return Storage(engine, Path(parsed.database or ""), origin, key)


def read_database(path: Path, work: Callable[[Transaction], T]) -> T:
    """Run `work`, which only reads, on a broker's database file, whether its broker runs or not.

    Raises Unusable if there is no such database, BrokerUnavailable if it cannot be read.
    """
    if not path.is_file():
        raise Unusable("there is no broker's database", where=str(path), do="Name the broker's folder or database.")
    engine = sa.create_engine(f"sqlite:///{path.absolute()}", connect_args={"timeout": BUSY_SECONDS})
    sa.event.listen(engine, "connect", _read_only)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            return work(Transaction(connection))
    except sa.exc.SQLAlchemyError as error:
        raise BrokerUnavailable(f"the database cannot be read: {_words(error)}", where=str(path)) from error
    finally:
        engine.dispose()


def check_head(transaction: Transaction, origin: str, key: Ed25519PrivateKey) -> None:
    """Check that the ledger's signed head is its tree's. Raises LedgerRefused."""
    size, head = transaction.size(), transaction.head()
    _, found = transaction.schema()
    if found != origin:
        raise LedgerRefused((f"the database holds the ledger {found}, not {origin}",), where="database")
    if size == 0 and not head.checkpoint:
        return
    for one in (head, transaction.published()):
        checkpoint = open_checkpoint(one.checkpoint, origin, key.public_key())
        tree = (one.size, root_hash(one.size, transaction.node) if one.size <= size else b"")
        if (checkpoint.size, checkpoint.root) != tree or (one is head and one.size != size):
            raise LedgerRefused(("the ledger's tree is not the one its head was signed for",), where="database")


def _identity(path: Path) -> tuple[int, int]:
    """Which file this is, whatever its name."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _private_file(path: Path) -> None:
    """Make the database's file for its owner alone before SQLite does (its other files take this one's mode)."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise BrokerUnavailable(f"the database cannot be opened: {error.strerror}", where=str(path)) from error


def _configure(connection: Any, _record: Any) -> None:
    """SQLite: transactions are begun by us; durable at each commit; readers do not stop the writer."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _read_only(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only=ON")
