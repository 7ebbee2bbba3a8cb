"""What an operator does to a broker's folder: one broker at a time on its file, a copy of its database, and back.

A copy is one SQLite file whatever the database is, so that it can come back into either. Sessions are not in it: a
nonce or a proof that was used since would count once more. Nor is anything that was decided since; what a database that
comes back cannot know, the ledger's witnesses do (attestation.broker.cosigning).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.broker.charters import charter_from_ledger
from attestation.broker.config import CONFIG_NAME, BrokerConfig, load_config
from attestation.broker.database import Database, SqliteDatabase, reading, writing
from attestation.broker.migrations import migrate as migrate_database
from attestation.broker.schema import BLOBS, ENTRIES, META, NODES, RESOURCES, VERSION, check_schema, make_schema
from attestation.broker.storage import check_head
from attestation.broker.transaction import Transaction
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.jws import ed25519_public_key
from attestation.ledger.entry import parse_entry
from attestation.ledger.tree import root_hash
from policies.errors import Unusable
from policies.keys import load_private_key

LOCK: Final = "lock"
KEPT: Final = (VERSION, META, ENTRIES, NODES, BLOBS, RESOURCES)
ROWS: Final = 200
"""Rows that are copied at once: with blobs of 1 MiB at most."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A copied ledger: how many entries, and the time of the last."""

    entries: int
    last: datetime | None


@contextmanager
def sole_broker(state: Path | None) -> Iterator[None]:
    """Hold the folder of a broker's file: nobody else runs a broker there, or puts another database in.

    None: a database that several may use, whose own locks tell. Raises BrokerUnavailable if somebody holds it.
    """
    if state is None:
        yield
        return
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BrokerUnavailable("a broker runs here already", where=str(state)) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def open_folder(folder: Path) -> Iterator[tuple[BrokerConfig, Database]]:
    """The settings and the database of the broker in `folder`. Raises Unusable if there is none."""
    config = load_config(folder / CONFIG_NAME)
    database = config.open_database(folder)
    try:
        yield config, database
    finally:
        database.dispose()


def back_up(folder: Path, copy: Path) -> Copied:
    """Copy the database of the broker in `folder`, running or not, to the new file `copy`.

    Raises Unusable if there is a file already, or none to copy; BrokerUnavailable if it cannot be read.
    """
    with open_folder(folder) as (config, database):
        _new_file(copy)
        try:
            if isinstance(database, SqliteDatabase):
                _copy_file(folder / config.database, copy)
            else:
                with _file(copy) as target, reading(database) as source, writing(target) as connection:
                    check_schema(source)
                    make_schema(connection)
                    _copy_rows(source, connection)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
    with _file(copy) as made, reading(made) as connection:
        return _copied(Transaction(connection))


def restore(folder: Path, copy: Path) -> Copied:
    """Put the copy back as the database of the broker in `folder`, which must not run; older copies are migrated.

    Raises LedgerRefused if it is not this broker's ledger, or not a continuation of the one that is there, whose
    entries others may have seen. Move that database away first, and tell the other members.
    """
    config = load_config(folder / CONFIG_NAME)
    if not copy.is_file():
        raise Unusable("there is no copy", where=str(copy), do="Name what `seal broker backup` made.")
    with sole_broker(config.state(folder)):
        fresh = (config.state(folder) or folder) / ".restored.sqlite"
        _remove(fresh)
        try:
            _new_file(fresh)
            _copy_file(copy, fresh)
            with _file(fresh) as made:
                migrate_database(made)
                with reading(made) as connection:
                    step = Transaction(connection)
                    keys = head_keys(step, folder, config)
                    check_head(step, step.origin() or "", keys)
                    found = _copied(step)
                    with _present(folder, config) as (target, present):
                        if present is not None:
                            _check_continues(step, present, copy)
                        if target is not None:
                            _replace_rows(connection, target)
            if config.state(folder) is not None:
                _put_file(fresh, folder / config.database)
        finally:
            _remove(fresh)
    return found


def migrate(folder: Path) -> tuple[str, str]:
    """Bring the database of the broker in `folder`, which must not run, to this program's schema; return old and new.

    Raises Unusable if it has a newer one, BrokerUnavailable if a broker runs.
    """
    with open_folder(folder) as (config, database), sole_broker(config.state(folder)):
        return migrate_database(database)


def head_keys(step: Transaction, folder: Path, config: BrokerConfig) -> tuple[Ed25519PublicKey, ...]:
    """Who must have signed a ledger's head: the key that its newest charter gives this broker; else the broker's own.

    Raises BrokerUnavailable or Refused if the ledger's charter is not one of this broker's consortium.
    """
    root = (folder / config.root).read_bytes() if (folder / config.root).is_file() else None
    charter = None if root is None else charter_from_ledger(step, root)
    entry = None if charter is None else charter.consortium.broker(config.name)
    if entry is not None:
        return (ed25519_public_key(entry.signing_key),)
    return (load_private_key(folder / config.signing_key).public_key(),)


# --- within -----------------------------------------------------------------------------------------------------------


def _copied(step: Transaction) -> Copied:
    size = step.size()
    raw = step.entry(size - 1) if size else None
    return Copied(size, None if raw is None else parse_entry(raw).time)


@contextmanager
def _present(folder: Path, config: BrokerConfig) -> Iterator[tuple[sa.Connection | None, Transaction | None]]:
    """What is there now: the shared database in a transaction that replaces it, and its ledger if it has one."""
    if config.state(folder) is not None:
        if not (folder / config.database).is_file():
            yield None, None
            return
        with _file(folder / config.database) as there, reading(there) as connection:
            yield None, Transaction(connection)
        return
    database = config.open_database(folder, make=True)
    try:
        with writing(database) as connection:
            database.check_alone(connection)
            fresh = make_schema(connection)
            check_schema(connection)
            yield connection, None if fresh else Transaction(connection)
    finally:
        database.dispose()


def _check_continues(copy: Transaction, present: Transaction, where: Path) -> None:
    """A copy may go on from what is there, and not differ from it. Raises LedgerRefused."""
    size, there = copy.size(), present.size()
    if there > size:
        reason = f"the copy has {size} entries, the database that is there {there}"
        raise LedgerRefused((reason,), where=str(where))
    if there and root_hash(there, copy.node) != root_hash(there, present.node):
        raise LedgerRefused(("the copy is another ledger than the one that is there",), where=str(where))


def _replace_rows(source: sa.Connection, target: sa.Connection) -> None:
    for table in reversed(META.metadata.sorted_tables):
        target.execute(sa.delete(table))
    _copy_rows(source, target)


def _copy_rows(source: sa.Connection, target: sa.Connection) -> None:
    for table in KEPT:
        if table is VERSION:
            target.execute(sa.delete(VERSION))
        rows = source.execution_options(stream_results=True).execute(sa.select(table))
        for part in rows.mappings().partitions(ROWS):
            target.execute(sa.insert(table), [dict(row) for row in part])


@contextmanager
def _file(path: Path) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(path, make=True)
    try:
        yield database
    finally:
        database.dispose()


def _new_file(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unusable(f"it cannot be made: {error.strerror}", where=str(path), do="Name a new file.") from error


def _copy_file(source: Path, target: Path) -> None:
    """SQLite's own copying, of a database that may be in use, but for its sessions."""
    try:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
            new.execute("DELETE FROM sessions")
            new.commit()
    except sqlite3.Error as error:
        raise BrokerUnavailable(f"the database cannot be copied: {error}", where=str(source)) from error


def _put_file(fresh: Path, database: Path) -> None:
    with closing(sqlite3.connect(fresh)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for path in _parts(database):
        if path != database:
            path.unlink(missing_ok=True)
    fresh.replace(database)


def _remove(database: Path) -> None:
    for path in _parts(database):
        path.unlink(missing_ok=True)


def _parts(database: Path) -> Iterable[Path]:
    return [database.with_name(database.name + suffix) for suffix in ("", "-wal", "-shm")]
