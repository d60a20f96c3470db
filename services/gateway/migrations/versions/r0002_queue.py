"""The queue lives in the jobs table: priorities, keys, owners, deadlines; leases of gateways; use of keys."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KEPT = (
    "seq, id, request_id, request_hash, parameters, state, stage, done, total, error_code, error_message, video,"
    " create_time_s, start_time_s, end_time_s, attempts, stage_seconds"
)
_NEW = {
    "key_id": "''",
    "priority": "5",
    "rank": "create_time_s",
    "batch_id": "''",
    "label": "''",
    "extras": "'{}'",
    "cost_class": "''",
    "owner": "''",
    "owners_lost": "0",
    "setbacks": "'[]'",
    "num_bytes": "0",
}
"""What the columns are of a job that was created before they were there."""


def upgrade() -> None:
    """Make the new table, then move every job: SQLite cannot change the constraints of a table that is there."""
    op.rename_table("jobs", "jobs_0001")
    op.drop_index("ix_jobs_state", table_name="jobs_0001")
    _create_jobs()
    values = ", ".join(_NEW.values())
    op.execute(f"INSERT INTO jobs ({_KEPT}, {', '.join(_NEW)}) SELECT {_KEPT}, {values} FROM jobs_0001")
    if op.get_bind().dialect.name == "postgresql":
        last = "(SELECT max(seq) FROM jobs)"
        op.execute(f"SELECT setval(pg_get_serial_sequence('jobs', 'seq'), {last}) WHERE {last} IS NOT NULL")
    op.drop_table("jobs_0001")
    _create_indices()
    op.create_table(
        "leases",
        sa.Column("executor_id", sa.String, primary_key=True),
        sa.Column("until_s", sa.Float, nullable=False),
    )
    op.create_table(
        "key_usage",
        sa.Column("key_id", sa.String, primary_key=True),
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("created", sa.Integer, nullable=False),
        sa.Column("served_time_s", sa.Float, nullable=False),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("request_id", sa.String),
        sa.Column("request_hash", sa.String, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("rank", sa.Float, nullable=False),
        sa.Column("deadline_time_s", sa.Float),
        sa.Column("batch_id", sa.String, nullable=False),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("extras", sa.JSON, nullable=False),
        sa.Column("parameters", sa.JSON, nullable=False),
        sa.Column("cost_class", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False),
        sa.Column("owners_lost", sa.Integer, nullable=False),
        sa.Column("setbacks", sa.JSON, nullable=False),
        sa.Column("stage", sa.String, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("error_code", sa.String),
        sa.Column("error_message", sa.String),
        sa.Column("video", sa.JSON(none_as_null=True)),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("create_time_s", sa.Float, nullable=False),
        sa.Column("start_time_s", sa.Float),
        sa.Column("end_time_s", sa.Float),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("stage_seconds", sa.JSON, nullable=False),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sa.UniqueConstraint("key_id", "request_id", name="uq_jobs_request"),
        sqlite_autoincrement=True,
    )


def _create_indices() -> None:
    op.create_index("ix_jobs_state_seq", "jobs", ["state", "seq"])
    op.create_index("ix_jobs_queue", "jobs", ["state", "key_id", "rank", "seq", "priority", "cost_class"])
    op.create_index("ix_jobs_key_state_seq", "jobs", ["key_id", "state", "seq"])
    op.create_index("ix_jobs_key_seq", "jobs", ["key_id", "seq"])
    partial = {
        "ix_jobs_batch": (["batch_id", "seq"], "batch_id > ''"),
        "ix_jobs_label": (["label", "seq"], "label > ''"),
        "ix_jobs_deadline": (["deadline_time_s"], "deadline_time_s IS NOT NULL"),
        "ix_jobs_end": (["end_time_s", "num_bytes"], "end_time_s IS NOT NULL"),
    }
    for name, (columns, condition) in partial.items():
        where = sa.text(condition)
        op.create_index(name, "jobs", columns, sqlite_where=where, postgresql_where=where)
