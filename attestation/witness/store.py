"""What a witness remembers: for each ledger the newest checkpoint that it has cosigned. SQLAlchemy Core over SQLite.

A ledger is its origin, whatever key signs it: a broker to which the charter gives another key goes on with its ledger.

A step forward is one UPDATE that names the state it was judged against, committed and synced (WAL, synchronous=FULL)
before its cosignature is made: of two requests from the same state one wins, in whatever threads or processes they are,
and a witness that dies has either not signed or not forgotten. A database that is gone is not made anew: a witness that
forgot what it cosigned could cosign a fork.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from attestation.errors import BrokerUnavailable
from attestation.ledger.checkpoint import Checkpoint
from policies.errors import Unusable

BUSY_SECONDS: Final = 3
"""How long a step waits for another process's."""
_METADATA = sa.MetaData()
_WITNESSED = sa.Table(
    "witnessed",
    _METADATA,
    sa.Column("origin", sa.String(255), primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("root", sa.LargeBinary, nullable=False),
)


class WitnessStore:
    """The state of one witness. Its calls block; they may come from any thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def seen(self, origin: str) -> Checkpoint | None:
        """The checkpoint of this ledger that was cosigned last. Raises BrokerUnavailable."""
        query = sa.select(_WITNESSED.c.size, _WITNESSED.c.root).where(_WITNESSED.c.origin == origin)
        try:
            with self._engine.connect() as connection:
                row = connection.execute(query).first()
        except sa.exc.SQLAlchemyError as error:
            raise _unavailable(error) from error
        return None if row is None else Checkpoint(origin, row.size, bytes(row.root))

    def advance(self, seen: Checkpoint | None, new: Checkpoint) -> bool:
        """Put `new` in place of `seen`, durably; False, and nothing done, if that is not the state any more.

        Raises BrokerUnavailable; then it is not known which of the two it is.
        """
        values = {"size": new.size, "root": new.root}
        if seen is None:
            statement: Any = sa.insert(_WITNESSED).values(origin=new.origin, **values)
        else:
            same = (_WITNESSED.c.origin == new.origin, _WITNESSED.c.size == seen.size, _WITNESSED.c.root == seen.root)
            statement = sa.update(_WITNESSED).where(*same).values(**values)
        try:
            with self._engine.begin() as connection:
                return bool(connection.execute(statement).rowcount == 1)
        except sa.exc.IntegrityError:
            return False  # another request was the first of this ledger
        except sa.exc.SQLAlchemyError as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()


def create_store(path: Path) -> None:
    """Make the state of a witness that has cosigned nothing yet, for its owner alone. Raises Unusable."""
    do = "Choose another folder: what a witness has cosigned is never begun anew."
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unusable(f"it cannot be made: {error.strerror}", where=str(path), do=do) from error
    engine = _engine(path)
    try:
        _METADATA.create_all(engine)
    finally:
        engine.dispose()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_store(path: Path) -> WitnessStore:
    """Open a witness's state. Raises Unusable if it is not there or is none."""
    do = "Bring the file back as it was last; without it, make a witness with a new key and have it put in the charter."
    if not path.is_file():
        raise Unusable("the state of this witness is gone", where=str(path), do=do)
    store = WitnessStore(_engine(path))
    try:
        store.seen("")
    except BrokerUnavailable as error:
        store.close()
        raise Unusable(f"this is no witness's state: {error.what}", where=str(path), do=do) from error
    return store


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        f"sqlite:///{path.absolute()}", connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, and write from their start
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _unavailable(error: sa.exc.SQLAlchemyError) -> BrokerUnavailable:
    cause = getattr(error, "orig", None) or error
    return BrokerUnavailable(f"the witness's state cannot be used: {str(cause)[:200]}", where="witness")
