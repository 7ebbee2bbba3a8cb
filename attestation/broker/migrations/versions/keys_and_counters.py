"""Longer names of key-encryption keys, found by them; counters by guest and boot from an index alone; 64-bit numbers.

The version is Alembic's from here on, not an entry of `meta`.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Change the tables."""
    op.drop_index("entries_by_resource", "entries")
    op.create_index("entries_by_guest", "entries", ["kind", "resource", "guest"])
    op.create_index("entries_by_boot", "entries", ["kind", "resource", "boot"])
    with op.batch_alter_table("resources") as resources:
        resources.alter_column("key_id", existing_type=sa.String(64), type_=sa.String(255), existing_nullable=False)
    op.create_index("ix_resources_key_id", "resources", ["key_id"])
    if op.get_bind().dialect.name != "sqlite":  # whose integers have 64 bits
        for table, column in (("entries", "number"), ("nodes", "position"), ("sessions", "expires")):
            op.alter_column(table, column, existing_type=sa.Integer, type_=sa.BigInteger, existing_nullable=False)
    op.execute(sa.text("DELETE FROM meta WHERE key = 'schema'"))
