"""What Alembic runs: migrations over the connection that it is given, whose transaction is its caller's."""

from __future__ import annotations

from alembic import context

from attestation.broker.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=False,  # the caller's transaction has it all
)
context.run_migrations()
