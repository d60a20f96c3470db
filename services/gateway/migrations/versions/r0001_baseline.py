"""The jobs table as it was before there were revisions; one that is there already is taken over."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table if it is not there."""
    if sa.inspect(op.get_bind()).has_table("jobs"):
        return
    op.create_table(
        "jobs",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("request_id", sa.String, unique=True),
        sa.Column("request_hash", sa.String, nullable=False),
        sa.Column("parameters", sa.JSON, nullable=False),
        sa.Column("state", sa.String, nullable=False, index=True),
        sa.Column("stage", sa.String, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("error_code", sa.String),
        sa.Column("error_message", sa.String),
        sa.Column("video", sa.JSON(none_as_null=True)),
        sa.Column("create_time_s", sa.Float, nullable=False),
        sa.Column("start_time_s", sa.Float),
        sa.Column("end_time_s", sa.Float),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("stage_seconds", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
