"""A job's progress on the terminal: one bar a stage; without a terminal one line a finished stage."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from cli.words import STAGES, state_word
from ovi.gateway.v1 import gateway_pb2 as pb


class JobView(Protocol):
    """Shows a job as it changes."""

    def __enter__(self) -> JobView: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, job: pb.Job) -> None:
        """Take note of the job's present state."""
        ...


def job_view(console: Console) -> JobView:
    """The view that fits the console."""
    return JobBars(console) if console.is_terminal else JobLines(console)


class JobLines:
    """A line when the job starts to wait, and for each finished stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[str] = set()

    def __enter__(self) -> JobLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, job: pb.Job) -> None:
        """Print what was not printed before."""
        self._say("job", f"job      {job.id}")
        if job.attempts > 1:
            self._say(f"attempt {job.attempts}", f"resumed  attempt {job.attempts}")
        for key, name, _ in STAGES.values():
            if key in job.stage_seconds:
                self._say(key, f"{name:<8} {job.stage_seconds[key]:.1f} s")

    def _say(self, key: str, line: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._console.print(line, soft_wrap=True)


class JobBars:
    """A spinner while the job waits, then a bar for each stage in turn."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=36),
            _Count(),
            TimeElapsedColumn(),
            _Remaining(),
            console=console,
        )
        self._waiting: TaskID | None = None
        self._bars: dict[pb.JobStage.ValueType, TaskID] = {}

    def __enter__(self) -> JobBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, job: pb.Job) -> None:
        """Move the bars."""
        if job.state == pb.JOB_STATE_QUEUED:
            if self._waiting is None:
                self._waiting = self._progress.add_task(state_word(job.state), total=None, unit="")
            return
        if self._waiting is not None:
            self._progress.remove_task(self._waiting)
            self._waiting = None
        for stage, (key, name, unit) in STAGES.items():
            current = stage == job.progress.stage
            if key in job.stage_seconds:
                self._finish(stage, name, unit, job.stage_seconds[key])
            elif current:
                bar = self._bar(stage, name, unit)
                self._progress.update(bar, total=job.progress.total or None, completed=job.progress.done)

    def _bar(self, stage: pb.JobStage.ValueType, name: str, unit: str) -> TaskID:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(name, total=None, unit=unit)
        return self._bars[stage]

    def _finish(self, stage: pb.JobStage.ValueType, name: str, unit: str, seconds: float) -> None:
        task_id = self._bar(stage, name, unit)
        task = next(task for task in self._progress.tasks if task.id == task_id)
        if not task.finished:
            total = task.total or 1
            self._progress.update(task_id, total=total, completed=total)
            self._progress.stop_task(task_id)
            # The server's own measure, which also covers the time before this watch began.
            task.finished_time = seconds


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        counted = unit and task.total is not None
        return Text(f"{task.completed:.0f}/{task.total:.0f} {unit}" if counted else "", style="cyan")


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        left_s = task.time_remaining
        return Text(f"{left_s:.0f} s left" if left_s and not task.finished else "", style="dim")
