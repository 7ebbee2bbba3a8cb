"""What an operator does to a broker's folder: one broker at a time in it, a copy of its database, and back."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from attestation.broker.config import CONFIG_NAME, load_config
from attestation.broker.storage import check_head, read_database
from attestation.errors import BrokerUnavailable, LedgerRefused
from attestation.ledger.checkpoint import parse_checkpoint
from policies.errors import Unusable
from policies.keys import load_private_key

LOCK: Final = "lock"


@contextmanager
def sole_broker(state: Path) -> Iterator[None]:
    """Hold the folder of a broker's database: nobody else runs a broker there, or puts another database in.

    Raises BrokerUnavailable if somebody does.
    """
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


def back_up(folder: Path, copy: Path) -> int:
    """Copy the database of the broker in `folder`, running or not, to the new file `copy`; return its entries' number.

    Raises Unusable if there is a file already, or none to copy.
    """
    database = folder / load_config(folder / CONFIG_NAME).database
    if not database.is_file():
        raise Unusable("there is no broker's database", where=str(database), do="Name the broker's folder.")
    _copy(database, copy)
    return read_database(copy, lambda step: step.head().size)


def restore(folder: Path, copy: Path) -> int:
    """Put the copy back as the database of the broker in `folder`, which must not run; return its entries' number.

    Raises LedgerRefused if it is not this broker's ledger, or has fewer entries than the database that is there, whose
    entries others may have seen. Move that database away first, and tell the other members.
    """
    config = load_config(folder / CONFIG_NAME)
    database, key = folder / config.database, load_private_key(folder / config.signing_key)
    with sole_broker(database.parent):
        note = read_database(copy, lambda step: step.head().checkpoint)
        origin = parse_checkpoint(note).origin
        read_database(copy, lambda step: check_head(step, origin, key))
        size = read_database(copy, lambda step: step.size())
        if database.is_file():
            present = read_database(database, lambda step: step.size())
            if present > size:
                reason = f"the copy has {size} entries, the database that is there {present}"
                raise LedgerRefused((reason,), where=str(copy))
        fresh = database.with_name(f".{database.name}.new")
        fresh.unlink(missing_ok=True)
        _copy(copy, fresh)
        for suffix in ("-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        fresh.replace(database)
    return size


def _copy(source: Path, target: Path) -> None:
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise Unusable(f"it cannot be made: {error.strerror}", where=str(target), do="Name a new file.") from error
    try:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
    except sqlite3.Error as error:
        target.unlink(missing_ok=True)
        raise BrokerUnavailable(f"the database cannot be copied: {error}", where=str(source)) from error
