"""Run by Alembic, on the connection and in the transaction of `migrate`."""

from alembic import context

from services.gateway.jobs.schema import metadata
from services.gateway.migrations import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=False,
)
context.run_migrations()
