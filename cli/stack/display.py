"""The life of the services on the terminal: a live table while they start, lines afterwards."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cli.stack.plan import GATEWAY, STAGES
from cli.stack.supervisor import ServiceState, StateChange

_STYLES = {
    ServiceState.STARTING: "yellow",
    ServiceState.SERVING: "green",
    ServiceState.RESTARTING: "red",
    ServiceState.STOPPING: "yellow",
    ServiceState.STOPPED: "dim",
}


class StackDisplay:
    """Shows state changes. Inside its `with`, on a terminal, as one table; otherwise as a line each."""

    def __init__(self, console: Console, *, brief: bool = False) -> None:
        """
        Args:
            console: where to.
            brief: wipe the table once all serve, and afterwards tell of restarts only.
        """
        self._console = console
        self._brief = brief
        self._changes: dict[str, StateChange] = {}
        self._begin_s = time.monotonic()
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def __enter__(self) -> StackDisplay:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._table, console=self._console, refresh_per_second=10, transient=self._brief
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def settle(self) -> None:
        """End the table; from now on changes are lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def notify(self, change: StateChange) -> None:
        """Take note of a change."""
        self._changes[change.service] = change
        if self._live is None and (not self._brief or change.state is ServiceState.RESTARTING):
            line = Text(f"{change.service:<13} ")
            line.append(change.state.value, style=_STYLES[change.state])
            if change.detail:
                line.append(f" {change.detail}")
            self._console.print(line, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name in (*STAGES, GATEWAY):
            change = self._changes.get(name, StateChange(name, ServiceState.STARTING))
            waiting = change.state is ServiceState.STARTING
            detail = f"{time.monotonic() - self._begin_s:.0f} s" if waiting else change.detail
            mark = self._spinner if waiting else Text("●", style=_STYLES[change.state])
            table.add_row(mark, name, Text(change.state.value, style=_STYLES[change.state]), Text(detail))
        return table
