"""Tables of API keys and of what this gateway and its replicas keep secret together."""

from __future__ import annotations

import sqlalchemy as sa

from services.gateway.jobs.schema import metadata

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("role", sa.String, nullable=False),
    # SHA-256 of the whole key in hex digits; the key itself is not kept.
    sa.Column("hash", sa.String, nullable=False),
    sa.Column("max_concurrent_jobs", sa.Integer),
    sa.Column("max_daily_jobs", sa.Integer),
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("create_time_s", sa.Float, nullable=False),
    sa.Column("revoke_time_s", sa.Float),
)

secrets_table = sa.Table(
    "gateway_secrets",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    # Hex digits.
    sa.Column("value", sa.String, nullable=False),
)
