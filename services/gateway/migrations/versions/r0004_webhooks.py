"""Who is to be told of the end of a job, and how far that is."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table; a webhook goes with its job."""
    op.create_table(
        "webhooks",
        sa.Column("job_id", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_time_s", sa.Float),
        sa.Column("last_error", sa.String),
    )
    due = sa.text("next_time_s IS NOT NULL")
    op.create_index("ix_webhooks_due", "webhooks", ["next_time_s"], sqlite_where=due, postgresql_where=due)
