"""What replicas of the gateway tell each other through the database: that a job or the queue has changed.

PostgreSQL carries it by NOTIFY; on SQLite there is only one gateway and nobody to tell. A signal may be lost, so
whatever waits for one also looks for itself now and then.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import sqlalchemy as sa

from services.gateway.jobs.domain import JobStage, Progress

CHANNEL = "ovi_jobs"


@dataclass(frozen=True)
class Signal:
    """One message."""

    sender: str
    """Executor id of the replica that sent it."""
    job_id: str = ""
    """The job that has changed; empty: only the queue has."""
    progress: Progress | None = None
    """How far the job is, where nothing else has changed; None: it has to be read again."""
    queue: bool = False
    """There may be something to begin."""

    def to_text(self) -> str:
        """As the payload of a notification, some 100 bytes."""
        values: dict[str, object] = {"s": self.sender, "j": self.job_id, "q": self.queue}
        if self.progress is not None:
            values["p"] = [self.progress.stage.value, self.progress.done, self.progress.total]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Signal:
        """From what `to_text` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(text)
            progress = None
            if "p" in values:
                stage, done, total = values["p"]
                progress = Progress(JobStage(stage), int(done), int(total))
            return cls(str(values["s"]), str(values["j"]), progress, bool(values["q"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{text[:100]!r} is no signal") from error


def send(connection: sa.Connection, signal: Signal) -> None:
    """Tell the other replicas when this connection's transaction is committed."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, signal.to_text())))
