"""API keys, and the secrets that gateways share."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("hash", sa.String, nullable=False),
        sa.Column("max_concurrent_jobs", sa.Integer),
        sa.Column("max_daily_jobs", sa.Integer),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("create_time_s", sa.Float, nullable=False),
        sa.Column("revoke_time_s", sa.Float),
    )
    op.create_table(
        "gateway_secrets",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
