"""Where a broker's tables are: a SQLite file (default), or PostgreSQL, which several processes may share.

A `Database` knows what differs between the two: how a transaction begins, when a writer must stop, and whose turn it is
to decide over a resource. Errors are told in the database's own first line and never with a password in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import sqlalchemy as sa

from attestation.errors import BrokerUnavailable
from policies.errors import Unusable

T = TypeVar("T")
TURNS: Final = 8
"""Resources over which one of several processes can decide at the same time."""
BUSY_SECONDS: Final = 5.0
"""How long a transaction waits for a locked database before it is given up."""


class Database(Protocol):
    """One broker's database."""

    @property
    def engine(self) -> sa.Engine:
        """Its connections. Transactions are begun and ended by statements of ours."""

    @property
    def shared(self) -> bool:
        """Whether several broker processes may be on it at once."""

    def begin_write(self, connection: sa.Connection) -> None:
        """Begin the only transaction that writes now; it reads what all before it have written."""

    def begin_read(self, connection: sa.Connection) -> None:
        """Begin a transaction that reads one snapshot."""

    def attend(self, connection: sa.Connection) -> None:
        """Mark the writer's new connection as that of a running broker, as long as it lives."""

    def check(self) -> None:
        """Look whether this is still the database that was opened. Raises OSError."""

    def take_turn(self, name: str) -> Callable[[], None] | None:
        """Wait until no other process decides over `name`; return how the turn is given up. None: nobody else can."""

    def check_alone(self, connection: sa.Connection) -> None:
        """In a transaction that writes: no broker may run on it until its end. Raises BrokerUnavailable."""

    def dispose(self) -> None:
        """Close it."""


class SqliteDatabase:
    """A file that one broker process has."""

    shared = False

    def __init__(self, path: Path, *, busy_seconds: float = BUSY_SECONDS, make: bool = False) -> None:
        """Raises BrokerUnavailable if the file is to be made (for its owner alone) and cannot."""
        if make:
            private_file(path)
        arguments = {"timeout": busy_seconds, "check_same_thread": False}
        self.engine = sa.create_engine(f"sqlite:///{path.absolute()}", connect_args=arguments)
        sa.event.listen(self.engine, "connect", _configure if make else _read_only)
        self._path = path
        self._identity = _identity(path)

    def begin_write(self, connection: sa.Connection) -> None:
        """BEGIN IMMEDIATE: SQLite's write lock at once."""
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    def begin_read(self, connection: sa.Connection) -> None:
        """BEGIN: a snapshot from the first read on (WAL)."""
        connection.exec_driver_sql("BEGIN")

    def attend(self, connection: sa.Connection) -> None:
        """Nothing: the folder is locked (attestation.broker.upkeep.sole_broker)."""

    def check(self) -> None:
        """SQLite would go on writing to a file that nobody can open any more."""
        if _identity(self._path) != self._identity:
            raise FileNotFoundError("its file was removed or replaced")

    def take_turn(self, name: str) -> None:
        """Nobody else is there."""

    def check_alone(self, connection: sa.Connection) -> None:
        """The folder is locked."""

    def dispose(self) -> None:
        """Close the file."""
        self.engine.dispose()


@contextmanager
def reading(database: Database) -> Iterator[sa.Connection]:
    """A connection in a transaction that reads one snapshot. Raises BrokerUnavailable."""
    try:
        with database.engine.connect() as connection:
            database.begin_read(connection)
            yield connection
    except sa.exc.SQLAlchemyError as error:
        raise BrokerUnavailable(f"the database cannot be read: {words(error)}", where="database") from error


@contextmanager
def writing(database: Database) -> Iterator[sa.Connection]:
    """A connection in the only transaction that writes, committed if the block ends well. Raises BrokerUnavailable."""
    try:
        with database.engine.connect() as connection:
            database.begin_write(connection)
            yield connection
            connection.exec_driver_sql("COMMIT")
    except sa.exc.SQLAlchemyError as error:
        raise BrokerUnavailable(f"the database cannot be written: {words(error)}", where="database") from error


def open_database(
    url: str, *, password: str | None = None, busy_seconds: float = BUSY_SECONDS, make: bool = True
) -> Database:
    """The database at `url`: `sqlite:////absolute/path` or `postgresql+psycopg://…` (attestation.broker.postgres).

    Nothing is read yet. Raises Unusable for another kind of database or a URL that cannot be used.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:  # its text may repeat the URL
        raise Unusable("this is no database URL", where="database", do="Give a path or a postgresql URL.") from error
    kind = parsed.get_backend_name()
    if kind == "sqlite" and parsed.database:
        return SqliteDatabase(Path(parsed.database), busy_seconds=busy_seconds, make=make)
    if kind == "postgresql":
        from attestation.broker.postgres import PostgresDatabase

        return PostgresDatabase(parsed, password=password, busy_seconds=busy_seconds)
    raise Unusable(f"{kind} is no database of ours", where="database", do="Give a path or a postgresql URL.")


def words(error: BaseException) -> str:
    """The first line of what a database said."""
    cause = getattr(error, "orig", None) or error
    return str(cause).splitlines()[0][:200] if str(cause) else type(cause).__name__


def private_file(path: Path) -> None:
    """Make the database's file for its owner alone before SQLite does (its other files take this one's mode)."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise BrokerUnavailable(f"the database cannot be opened: {error.strerror}", where=str(path)) from error


def _identity(path: Path) -> tuple[int, int]:
    """Which file this is, whatever its name."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _configure(connection: Any, _record: Any) -> None:
    """SQLite: transactions are begun by us; durable at each commit; readers do not stop the writer."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _read_only(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only=ON")
