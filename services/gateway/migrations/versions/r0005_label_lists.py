"""Lists of a label are quick however many jobs have it, whatever else they are filtered by."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the indices."""
    labelled = sa.text("label > ''")
    for name, columns in {
        "ix_jobs_label_state": ["label", "state", "seq"],
        "ix_jobs_label_key": ["label", "key_id", "seq"],
        "ix_jobs_label_key_state": ["label", "key_id", "state", "seq"],
    }.items():
        op.create_index(name, "jobs", columns, sqlite_where=labelled, postgresql_where=labelled)
