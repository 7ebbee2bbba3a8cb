"""The broker's tables, and which version of them a database has (attestation.broker.migrations for older ones)."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from policies.errors import Unusable

REVISION: Final = "0002"
"""The newest migration: what this program reads and writes."""
METADATA: Final = sa.MetaData()
_NUMBER: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
META: Final = sa.Table(
    "meta", METADATA, sa.Column("key", sa.String(64), primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
ENTRIES: Final = sa.Table(
    "entries",
    METADATA,
    sa.Column("number", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("resource", sa.String(255)),
    sa.Column("guest", sa.String(255)),
    sa.Column("boot", sa.String(64)),
    sa.Column("raw", sa.LargeBinary, nullable=False),
    sa.Index("entries_by_guest", "kind", "resource", "guest"),
    sa.Index("entries_by_boot", "kind", "resource", "boot"),
)
"""`resource`, `guest` and `boot` repeat what an entry's body says: counters count by them."""
NODES: Final = sa.Table(
    "nodes",
    METADATA,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", _NUMBER, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)
BLOBS: Final = sa.Table(
    "blobs",
    METADATA,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
SESSIONS: Final = sa.Table(
    "sessions",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("expires", _NUMBER, nullable=False, index=True),
    sa.Column("state", sa.Text, nullable=False),
)
RESOURCES: Final = sa.Table(
    "resources",
    METADATA,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("serial", sa.BigInteger, nullable=False),
    sa.Column("key_id", sa.String(255), nullable=False, index=True),
    sa.Column("wrapped_key", sa.LargeBinary, nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)
VERSION: Final = sa.Table("alembic_version", METADATA, sa.Column("version_num", sa.String(32), primary_key=True))
"""Alembic's own table."""


def make_schema(connection: sa.Connection) -> bool:
    """Make the tables in an empty database; return whether it was one."""
    if sa.inspect(connection).has_table(META.name):
        return False
    METADATA.create_all(connection)
    connection.execute(sa.insert(VERSION).values(version_num=REVISION))
    return True


def found_revision(connection: sa.Connection) -> str | None:
    """Which version a database has; None if there is no broker's."""
    inspected = sa.inspect(connection)
    if inspected.has_table(VERSION.name):
        found = connection.execute(sa.select(VERSION.c.version_num)).scalar()
        if found is not None:
            return str(found)
    if not inspected.has_table(META.name):
        return None
    said = connection.execute(sa.select(META.c.value).where(META.c.key == "schema")).scalar()
    return None if said is None else f"{int(said):04d}"  # before migrations, a database said itself what it is


def check_schema(connection: sa.Connection) -> None:
    """Raise Unusable unless the database has the version of this program."""
    found = found_revision(connection)
    if found == REVISION:
        return
    if found is None:
        raise Unusable("this is no broker's database", where="database", do="Name the broker's folder or database.")
    if found < REVISION:
        do = "End its brokers, back it up, and run `seal broker migrate FOLDER`."
        raise Unusable(f"the database has the older schema {found}, not {REVISION}", where="database", do=do)
    what = f"the database has the newer schema {found}, not {REVISION}"
    raise Unusable(what, where="database", do="Run the version that made it.")
