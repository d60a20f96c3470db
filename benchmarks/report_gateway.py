"""The tables of docs/performance.md that tell of the gateway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import Line, newest, read_lines, sources, table

_QUEUES = ("gateway-queue", "gateway-postgres")


def _queue_lines(folder: Path, list_name: str, place: Callable[[Line], tuple[object, ...]]) -> list[Line]:
    """Rows of queues in both databases; the order of the first file's rows is kept."""
    lines = [line for kind in _QUEUES for line in read_lines(folder, kind, list_name)]
    order = {what: number for number, what in reversed(list(enumerate(map(place, lines))))}
    return newest(lines, lambda line: (line.device, order[place(line)], *_queue_of(line)))


def _queue_of(line: Line) -> tuple[bool, int]:
    return line.row["database"] != "SQLite", line.row["queued"]


def _headed(line: Line) -> str:
    return f"{line.row['database']}, {line.row['queued']:,} queued"


def calls_table(folder: Path) -> str:
    """What calls take with a long queue."""
    lines = _queue_lines(folder, "calls", lambda line: (line.row["call"],))
    return _pivot(lines, ["call, ms p50 / p99"], lambda line: (line.row["call"],), _spread) + sources(lines)


def creates_table(folder: Path) -> str:
    """What creating jobs takes over each API, and how many are created in a second."""
    lines = _queue_lines(folder, "rows", lambda line: (line.row["api"], line.row["clients"]))
    head = ["create, ms p50 / p99, (a second)", "clients at once"]
    return _pivot(
        lines,
        head,
        lambda line: (line.row["api"], str(line.row["clients"])),
        lambda line: f"{_spread(line)} ({line.row['per_s']:.0f})",
    )


def _pivot(
    lines: list[Line], head: list[str], names: Callable[[Line], tuple[str, ...]], cell: Callable[[Line], str]
) -> str:
    """Queues side by side."""
    columns = list(dict.fromkeys(_headed(line) for line in sorted(lines, key=_queue_of)))
    cells = {(names(line), _headed(line)): cell(line) for line in lines}
    rows = list(dict.fromkeys(map(names, lines)))
    return table([*head, *columns], [[*row, *(cells.get((row, column), "–") for column in columns)] for row in rows])


def _spread(line: Line, name: str = "spread") -> str:
    taken = line.row[name]
    return f"{taken['p50_ms']:.1f} / {taken['p99_ms']:.0f}"


def watchers_table(folder: Path) -> str:
    """How soon watchers hear of a step."""
    lines = newest(
        read_lines(folder, "gateway-watchers"), lambda line: (line.device, line.row["sse"], line.row["grpc"])
    )
    head = ["event streams and gRPC streams", "over SSE, ms p50 / p99", "over gRPC", "all open after"]
    head += ["resident MiB", "open files", "threads"]
    rows = [
        [
            f"{line.row['sse']:,} and {line.row['grpc']:,}",
            _spread(line, "over_sse"),
            _spread(line, "over_grpc"),
            f"{line.row['opened_s']:.1f} s",
            *_footprint(line),
        ]
        for line in lines
    ]
    return table(head, rows) + sources(lines)


def idle_table(folder: Path) -> str:
    """What a gateway takes that nobody asks for anything."""
    found = read_lines(folder, "gateway-idle")
    order = {line.row["state"]: number for number, line in enumerate(found)}
    lines = newest(found, lambda line: (line.device, order[line.row["state"]]))
    head = ["nobody asks; there are", "% of a core", "resident MiB", "open files", "threads"]
    rows = [[line.row["state"], f"{line.row['core_percent']:.1f}", *_footprint(line)] for line in lines]
    return table(head, rows) + sources(lines)


def finished_table(folder: Path) -> str:
    """What finished jobs leave behind; of the newest run alone, whose rows follow from one another."""
    found = read_lines(folder, "gateway-finished")
    lines = [line for line in found if line.moment == found[-1].moment]
    head = ["gateway", "jobs kept", "jobs a second", "its ms of a core a job", "database MiB"]
    head += ["resident MiB", "open files", "threads"]
    rows = [
        [
            line.row["moment"],
            f"{line.row['kept']:,}",
            line.number("jobs_per_s", 1),
            line.number("processor_ms", 0),
            line.number("database_mib", 0),
            *_footprint(line),
        ]
        for line in lines
    ]
    return table(head, rows) + sources(lines)


def _footprint(line: Line) -> list[str]:
    held = line.row["footprint"]
    return [f"{held['resident_mib']:.0f}", str(held["descriptors"]), str(held["threads"])]


TABLES: dict[str, Callable[[Path], str]] = {
    "gateway-calls": calls_table,
    "gateway-creates": creates_table,
    "gateway-watchers": watchers_table,
    "gateway-idle": idle_table,
    "gateway-finished": finished_table,
}
