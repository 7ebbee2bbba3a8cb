"""PostgreSQL by psycopg: one database that several processes of one broker share.

Writers take turns by an advisory lock that a transaction holds to its end; since it is taken first and the isolation is
READ COMMITTED, each writer reads what the one before it committed. Decisions over one resource take turns by a lock of
a session, so that two processes do not undo each other's work. Both end with their connection: whoever dies holds
nobody up. Every wait has an end: to connect, for a lock, of a statement, of a transaction whose process is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final

import sqlalchemy as sa

from attestation.broker.database import TURNS, words
from attestation.errors import BrokerUnavailable
from policies.errors import Unusable

CONNECT_SECONDS: Final = 5
STATEMENT_SECONDS: Final = 10
IDLE_SECONDS: Final = 8
"""How long a transaction may idle before the server ends it, its locks included."""
CONNECTIONS: Final = 16
LOCAL: Final = frozenset({"", "localhost", "127.0.0.1", "::1"})
VERIFYING: Final = frozenset({"verify-ca", "verify-full"})
_LOCKS: Final = 0x5EA1
"""The class of the locks of a database: the writer's (1), that of running brokers (2)."""
_TURNS: Final = 0x5EA2
"""The class of the locks of resources: by 32 bits of their names' digests."""


class PostgresDatabase:
    """A PostgreSQL database. The server's clock and settings decide nothing here but how durable a commit is."""

    shared = True

    def __init__(self, url: sa.URL, *, password: str | None, busy_seconds: float) -> None:
        """Raises Unusable for a URL with a password in it, or a server elsewhere whose certificate is not checked."""
        settings = {name: str(value) for name, value in url.query.items()}
        check_url(url, settings)
        limits = {
            "default_transaction_isolation": "read\\ committed",
            "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
            "lock_timeout": f"{int(busy_seconds * 1000)}ms",
            "statement_timeout": f"{STATEMENT_SECONDS}s",
            "synchronous_commit": "on",
        }
        arguments: dict[str, Any] = {
            "application_name": "seal-broker",
            "connect_timeout": CONNECT_SECONDS,
            "keepalives_count": 3,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "options": " ".join(f"-c {name}={value}" for name, value in limits.items()),
            "tcp_user_timeout": IDLE_SECONDS * 1000,
        }
        if password is not None:
            arguments["password"] = password
        self.engine = _engine(url, arguments, CONNECTIONS, busy_seconds)
        self._turns = _engine(url, arguments, TURNS, busy_seconds)

    def begin_write(self, connection: sa.Connection) -> None:
        """Wait for the writer's lock; every statement after it reads what others committed before."""
        connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCKS}, 1)")

    def begin_read(self, connection: sa.Connection) -> None:
        """One snapshot for all that is read."""
        connection.exec_driver_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def attend(self, connection: sa.Connection) -> None:
        """Hold the lock of running brokers with this connection. Raises BrokerUnavailable if it is restored now."""
        if not connection.exec_driver_sql(f"SELECT pg_try_advisory_lock_shared({_LOCKS}, 2)").scalar():
            raise BrokerUnavailable("the database is being restored or migrated", where="database")

    def check_alone(self, connection: sa.Connection) -> None:
        """In a transaction that writes: no broker may run on it until its end. Raises BrokerUnavailable."""
        if not connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCKS}, 2)").scalar():
            raise BrokerUnavailable("a broker runs on this database", where="database")

    def check(self) -> None:
        """The server is asked by every statement."""

    def take_turn(self, name: str) -> Callable[[], None]:
        """Wait for the lock of `name`. Raises BrokerUnavailable after some seconds."""
        number = int.from_bytes(sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big", signed=True)
        try:
            connection = self._turns.connect()
            try:
                connection.exec_driver_sql(f"SELECT pg_advisory_lock({_TURNS}, {number})")
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
        except sa.exc.SQLAlchemyError as error:
            raise BrokerUnavailable(f"another process decides over {name}: {words(error)}", where="database") from error
        given_up = threading.Lock()

        def give_up() -> None:
            if not given_up.acquire(blocking=False):
                return
            try:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_TURNS}, {number})")
            except sa.exc.SQLAlchemyError:
                connection.invalidate()  # the lock ends with it
            finally:
                connection.close()

        return give_up

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self._turns.dispose()


def check_url(url: sa.URL, settings: dict[str, str]) -> None:
    """Refuse what would show a password or believe any server. Raises Unusable."""
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        do = "Write postgresql+psycopg://USER@HOST/DATABASE."
        raise Unusable(f"the driver {url.drivername} is not used here", where="database", do=do)
    if url.password is not None or "password" in settings:
        do = "Put it alone into a file of mode 0600 and name that by `database_password`, or use PGPASSFILE."
        raise Unusable("the database's URL has a password in it", where="database", do=do)
    if "options" in settings:
        raise Unusable("the database's URL sets `options`", where="database", do="Set them for its role in PostgreSQL.")
    host = settings.get("host", url.host or "")
    if host not in LOCAL and not host.startswith("/") and settings.get("sslmode") not in VERIFYING:
        do = "Add ?sslmode=verify-full&sslrootcert=FILE to the URL."
        raise Unusable("a database on another host must prove who it is", where="database", do=do)


def _engine(url: sa.URL, arguments: dict[str, Any], size: int, wait: float) -> sa.Engine:
    try:
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args=arguments,
            hide_parameters=True,
            isolation_level="AUTOCOMMIT",
            max_overflow=0,
            pool_size=size,
            pool_timeout=wait,
        )
    except ImportError as error:
        do = "Install the extra: pip install 'sealwright[postgres]'."
        raise Unusable("psycopg is not installed", where="database", do=do) from error
