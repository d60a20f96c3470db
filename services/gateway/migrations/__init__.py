"""Brings a database to the tables of this version, at the start of a gateway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from services.gateway.database import CannotStart

VERSION_TABLE = "ovi_schema_version"
_LOCK = 0x6F76_6901
"""Of PostgreSQL's advisory locks; one gateway migrates, others wait for it."""


class NewerDatabase(CannotStart):
    """The tables are those of a later version of this software."""

    reason = "NEWER_DATABASE"


def migrate(engine: sa.Engine) -> None:
    """Make or change the tables; returns at once if they are this version's. Jobs are kept.

    Raises:
        NewerDatabase: a later version has changed them already.
        sqlalchemy.exc.DatabaseError: the database cannot be used.
    """
    config = Config()
    config.set_main_option("script_location", "services.gateway:migrations")
    with engine.connect() as connection, _alone(connection):
        config.attributes["connection"] = connection
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        present = context.get_current_revision()
        if present is not None and present not in known:
            what = f"the database has the tables of revision {present}, this version knows {', '.join(sorted(known))}"
            raise NewerDatabase(f"{what}; start the version that made them, or a later one")
        command.upgrade(config, "head")


@contextlib.contextmanager
def _alone(connection: sa.Connection) -> Iterator[None]:
    """One transaction, which no other gateway's migration can cross."""
    if connection.dialect.name == "sqlite":
        # The driver begins none before statements that define tables.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
