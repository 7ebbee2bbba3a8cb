"""Migrations of the broker's database, by Alembic: all that are missing, in one transaction.

`versions/` has one module for each change since the first schema; their newest is attestation.broker.schema.REVISION.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from attestation.broker.database import Database, writing
from attestation.broker.schema import REVISION, VERSION, check_schema, found_revision
from policies.errors import Unusable


def migrate(database: Database) -> tuple[str, str]:
    """Bring a database to this program's version; return the version it had and the one it has.

    All of it or nothing is done, and nothing to one that is there already. Raises Unusable if it is no broker's, or a
    newer one's; BrokerUnavailable if a broker runs on it, or it cannot be written.
    """
    with writing(database) as connection:
        database.check_alone(connection)
        found = found_revision(connection)
        if found is None or found >= REVISION:
            check_schema(connection)
            return REVISION, REVISION
        if not sa.inspect(connection).has_table(VERSION.name):
            VERSION.create(connection)
            connection.execute(sa.insert(VERSION).values(version_num=found))
        upgrade(connection)
        check_schema(connection)
    return found, REVISION


def upgrade(connection: sa.Connection, revision: str = "head") -> None:
    """Run the migrations that are missing up to `revision` in the connection's transaction. Raises Unusable."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except CommandError as error:
        raise Unusable(f"the database cannot be migrated: {error}", where="database", do="Restore a backup.") from error
