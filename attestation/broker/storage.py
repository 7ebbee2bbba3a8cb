"""The broker's database: the ledger, its blobs, sessions, resources. SQLAlchemy Core over SQLite.

One writer thread runs transactions in batches: each is a function of a `Transaction` run in a savepoint of its own,
and all of a batch are committed together, with one signed checkpoint, before any of their answers leaves. So an entry
is durable (WAL, synchronous=FULL) when its caller hears of it, a batch costs one fsync, and a decision, its ledger
entry and its counters are one atomic step.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attestation.broker.sessions import Session
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.ledger.checkpoint import Checkpoint, open_checkpoint, sign_checkpoint
from attestation.ledger.entry import Entry
from attestation.ledger.receipt import Receipt
from attestation.ledger.tree import appended_nodes, consistency_proof, inclusion_proof, leaf_hash, root_hash
from policies.errors import Unusable

T = TypeVar("T")
SCHEMA_VERSION: Final = "1"
BATCH: Final = 64
QUEUE: Final = 1024
BUSY_SECONDS: Final = 5
"""How long a transaction waits for a locked database before it is given up."""

_METADATA = sa.MetaData()
_META = sa.Table(
    "meta", _METADATA, sa.Column("key", sa.String(64), primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
_ENTRIES = sa.Table(
    "entries",
    _METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("resource", sa.String(255)),
    sa.Column("guest", sa.String(255)),
    sa.Column("boot", sa.String(64)),
    sa.Column("raw", sa.LargeBinary, nullable=False),
    sa.Index("entries_by_resource", "kind", "resource"),
)
_NODES = sa.Table(
    "nodes",
    _METADATA,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)
_BLOBS = sa.Table(
    "blobs",
    _METADATA,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
_SESSIONS = sa.Table(
    "sessions",
    _METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("expires", sa.Integer, nullable=False, index=True),
    sa.Column("state", sa.Text, nullable=False),
)
_RESOURCES = sa.Table(
    "resources",
    _METADATA,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("serial", sa.BigInteger, nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True)
class StoredResource:
    """A resource as it lies in the database: its value under a key of its own, that key under the KEK."""

    name: str
    serial: int
    key_id: str
    wrapped_key: bytes
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """The ledger's head: how many entries, and the signed checkpoint over them."""

    size: int
    checkpoint: str


class Transaction:
    """What one step may read and write. Valid only inside `Storage.transact` or `Storage.read`."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self.appended: list[int] = []

    # --- ledger -----------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """How many entries the ledger has, those of this batch included."""
        value = self._meta("size")
        return int(value) if value is not None else 0

    def node(self, level: int, position: int) -> bytes:
        """A stored tree node: the `Nodes` reader of attestation.ledger.tree."""
        found = self._connection.execute(
            sa.select(_NODES.c.hash).where(_NODES.c.level == level, _NODES.c.position == position)
        ).scalar_one()
        return bytes(found)

    def append(
        self,
        entry: Entry,
        *,
        blobs: Mapping[str, bytes] | None = None,
        resource: str | None = None,
        guest: str | None = None,
        boot: str | None = None,
    ) -> int:
        """Append an entry and return its number.

        `resource`, `guest` and `boot` (hex REPORT_ID) are what counters count by; they repeat what the entry's body
        says. `blobs` are contents by their SHA-256.
        """
        raw, number = entry.to_bytes(), self.size()
        for digest, content in (blobs or {}).items():
            self._put_blob(digest, content)
        self._connection.execute(
            sa.insert(_ENTRIES).values(
                number=number, kind=entry.kind, resource=resource, guest=guest, boot=boot, raw=raw
            )
        )
        for level, position, value in appended_nodes(number, leaf_hash(raw), self.node):
            self._connection.execute(sa.insert(_NODES).values(level=level, position=position, hash=value))
        self._set_meta("size", str(number + 1))
        self.appended.append(number)
        return number

    def entry(self, number: int) -> bytes | None:
        """The bytes of an entry, or None."""
        raw = self._connection.execute(sa.select(_ENTRIES.c.raw).where(_ENTRIES.c.number == number)).scalar()
        return None if raw is None else bytes(raw)

    def entries(self, start: int, end: int) -> list[bytes]:
        """The bytes of the entries [start, end)."""
        rows = self._connection.execute(
            sa.select(_ENTRIES.c.raw)
            .where(_ENTRIES.c.number >= start, _ENTRIES.c.number < end)
            .order_by(_ENTRIES.c.number)
        )
        return [bytes(raw) for (raw,) in rows]

    def count(self, kind: str, *, resource: str, guest: str | None = None, boot: str | None = None) -> int:
        """How many entries of a kind the ledger has about a resource (to one guest, in one boot)."""
        query = (
            sa.select(sa.func.count())
            .select_from(_ENTRIES)
            .where(_ENTRIES.c.kind == kind, _ENTRIES.c.resource == resource)
        )
        if guest is not None:
            query = query.where(_ENTRIES.c.guest == guest)
        if boot is not None:
            query = query.where(_ENTRIES.c.boot == boot)
        return int(self._connection.execute(query).scalar_one())

    def last_entry(self, kind: str) -> bytes | None:
        """The bytes of the newest entry of a kind, or None."""
        raw = self._connection.execute(
            sa.select(_ENTRIES.c.raw).where(_ENTRIES.c.kind == kind).order_by(_ENTRIES.c.number.desc()).limit(1)
        ).scalar()
        return None if raw is None else bytes(raw)

    def blob(self, digest: str) -> bytes | None:
        """A blob by its SHA-256, or None."""
        found = self._connection.execute(sa.select(_BLOBS.c.content).where(_BLOBS.c.sha256 == digest)).scalar()
        return None if found is None else bytes(found)

    def blob_digests(self) -> list[str]:
        """The SHA-256 of every blob."""
        return list(self._connection.execute(sa.select(_BLOBS.c.sha256).order_by(_BLOBS.c.sha256)).scalars())

    def head(self) -> Head:
        """The head of the last commit."""
        return Head(int(self._meta("head_size") or 0), self._meta("checkpoint") or "")

    def receipt(self, number: int, head: Head) -> Receipt:
        """The receipt of an entry under a head."""
        return Receipt(number, head.checkpoint, tuple(inclusion_proof(number, head.size, self.node)))

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The proof that the first `new` entries extend the first `old`."""
        return consistency_proof(old, new, self.node)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def session(self, identifier: str) -> Session | None:
        """A session, or None."""
        state = self._connection.execute(sa.select(_SESSIONS.c.state).where(_SESSIONS.c.id == identifier)).scalar()
        return None if state is None else Session.model_validate_json(state)

    def new_session(self, session: Session) -> None:
        """Keep a new session."""
        self._connection.execute(
            sa.insert(_SESSIONS).values(id=session.id, expires=session.expires, state=session.model_dump_json())
        )

    def update_session(self, session: Session) -> None:
        """Keep a session's next form."""
        self._connection.execute(
            sa.update(_SESSIONS)
            .where(_SESSIONS.c.id == session.id)
            .values(expires=session.expires, state=session.model_dump_json())
        )

    def prune_sessions(self, at: datetime) -> int:
        """Forget the sessions that have ended; return how many are left."""
        self._connection.execute(sa.delete(_SESSIONS).where(_SESSIONS.c.expires <= int(at.timestamp())))
        return int(self._connection.execute(sa.select(sa.func.count()).select_from(_SESSIONS)).scalar_one())

    # --- resources --------------------------------------------------------------------------------------------------

    def resource(self, name: str) -> StoredResource | None:
        """A resource, or None."""
        row = self._connection.execute(sa.select(_RESOURCES).where(_RESOURCES.c.name == name)).first()
        if row is None:
            return None
        return StoredResource(row.name, row.serial, row.key_id, bytes(row.wrapped_key), bytes(row.sealed))

    def resources(self) -> list[tuple[str, int]]:
        """Name and serial of every resource."""
        rows = self._connection.execute(sa.select(_RESOURCES.c.name, _RESOURCES.c.serial).order_by(_RESOURCES.c.name))
        return [(name, serial) for name, serial in rows]

    def put_resource(self, resource: StoredResource) -> None:
        """Keep a resource in place of an older one."""
        values = {
            "serial": resource.serial,
            "key_id": resource.key_id,
            "wrapped_key": resource.wrapped_key,
            "sealed": resource.sealed,
        }
        changed = self._connection.execute(
            sa.update(_RESOURCES).where(_RESOURCES.c.name == resource.name).values(**values)
        )
        if changed.rowcount == 0:
            self._connection.execute(sa.insert(_RESOURCES).values(name=resource.name, **values))

    # --- within -----------------------------------------------------------------------------------------------------

    def set_head(self, head: Head) -> None:
        """Keep the head of this commit (the writer's)."""
        self._set_meta("head_size", str(head.size))
        self._set_meta("checkpoint", head.checkpoint)

    def _put_blob(self, digest: str, content: bytes) -> None:
        if sha256(content).hexdigest() != digest:
            raise Unusable("a blob is not what its digest says", where=digest, do="Name blobs by their SHA-256.")
        if self._connection.execute(sa.select(_BLOBS.c.sha256).where(_BLOBS.c.sha256 == digest)).first() is None:
            self._connection.execute(sa.insert(_BLOBS).values(sha256=digest, content=content))

    def _meta(self, key: str) -> str | None:
        return self._connection.execute(sa.select(_META.c.value).where(_META.c.key == key)).scalar()

    def _set_meta(self, key: str, value: str) -> None:
        changed = self._connection.execute(sa.update(_META).where(_META.c.key == key).values(value=value))
        if changed.rowcount == 0:
            self._connection.execute(sa.insert(_META).values(key=key, value=value))


@dataclass(slots=True)
class _Step(Generic[T]):
    work: Callable[[Transaction], T]
    done: Future[tuple[T, tuple[Receipt, ...]]]


class Storage:
    """The database of one broker. Open it with `open_storage`; close it."""

    def __init__(self, engine: sa.Engine, origin: str, key: Ed25519PrivateKey) -> None:
        self._engine = engine
        self._origin = origin
        self._key = key
        self._steps: queue.Queue[_Step[Any] | None] = queue.Queue(QUEUE)
        self._writer = threading.Thread(target=self._write, name="ledger-writer", daemon=True)
        self._writer.start()

    async def transact(self, work: Callable[[Transaction], T]) -> tuple[T, tuple[Receipt, ...]]:
        """Run `work` in a transaction; return its result and the receipts of what it appended, once durable.

        What `work` raises comes back, and nothing of it is kept. Raises BrokerUnavailable if the database cannot be
        written or too much waits for it.
        """
        return await self.submit(work)

    def submit(self, work: Callable[[Transaction], T]) -> asyncio.Future[tuple[T, tuple[Receipt, ...]]]:
        """Like `transact`, but it takes its place in the writer's order at once, whenever it is awaited."""
        return asyncio.wrap_future(self._submit(work))

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
        self._engine.dispose()

    def _submit(self, work: Callable[[Transaction], T]) -> Future[tuple[T, tuple[Receipt, ...]]]:
        step: _Step[T] = _Step(work, Future())
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
        outcomes: list[tuple[_Step[Any], Any, list[int], BaseException | None]] = []
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                transaction = Transaction(connection)
                outcomes.extend(self._run(connection, transaction, step) for step in batch)
                head = transaction.head()
                if any(appended for _, _, appended, _ in outcomes):
                    size = transaction.size()
                    checkpoint = Checkpoint(self._origin, size, root_hash(size, transaction.node))
                    head = Head(size, sign_checkpoint(checkpoint, self._key))
                    transaction.set_head(head)
                receipts = [tuple(transaction.receipt(n, head) for n in appended) for _, _, appended, _ in outcomes]
                connection.exec_driver_sql("COMMIT")
        except Exception as error:  # whatever it is, each waiting caller must hear that nothing was kept
            failure = BrokerUnavailable(f"the database cannot be written: {_words(error)}", where="database")
            failure.__cause__ = error
            for step in batch:
                step.done.set_exception(failure)
            return
        for (step, result, _, problem), proofs in zip(outcomes, receipts, strict=True):
            if problem is not None:
                step.done.set_exception(problem)
            else:
                step.done.set_result((result, proofs))

    @staticmethod
    def _run(
        connection: sa.Connection, transaction: Transaction, step: _Step[Any]
    ) -> tuple[_Step[Any], Any, list[int], BaseException | None]:
        transaction.appended = []
        connection.exec_driver_sql("SAVEPOINT step")
        try:
            result = step.work(transaction)
        except sa.exc.SQLAlchemyError:
            raise  # the database itself: the whole batch fails
        except Exception as problem:  # goes to the caller that asked, by its future
            connection.exec_driver_sql("ROLLBACK TO step")
            connection.exec_driver_sql("RELEASE step")
            return step, None, [], problem
        connection.exec_driver_sql("RELEASE step")
        return step, result, transaction.appended, None


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
            _METADATA.create_all(connection)
            transaction = Transaction(connection)
            found = transaction._meta("schema")
            if found is None:
                transaction._set_meta("schema", SCHEMA_VERSION)
                transaction._set_meta("origin", origin)
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
    return Storage(engine, origin, key)


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
    if transaction._meta("origin") != origin:
        raise LedgerRefused(
            (f"the database holds the ledger {transaction._meta('origin')}, not {origin}",), where="database"
        )
    if size == 0 and not head.checkpoint:
        return
    checkpoint = open_checkpoint(head.checkpoint, origin, key.public_key())
    if (checkpoint.size, checkpoint.root) != (size, root_hash(size, transaction.node)):
        raise LedgerRefused(("the ledger's tree is not the one its head was signed for",), where="database")


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
