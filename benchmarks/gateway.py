"""How quick the gateway is, and what it takes of the machine; its stages are scripted, so nothing but it works.

`python -m benchmarks.gateway --save` takes some five minutes: calls with 20,000 and 200,000 queued jobs (SQLite) and
with 20,000 (PostgreSQL), 1,000 event streams and 1,000 gRPC streams that hear of steps, idle gateways.
`python -m benchmarks.gateway --parts finished --save` takes longer: 10,000 jobs that run to their end. `--parts` takes
some of `queue,postgres,watchers,idle,finished`. Each part is saved as a file of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.common import describe_run, result_path, save_result
from benchmarks.gateway_finished import measure_finished
from benchmarks.gateway_queue import POSTGRESQL, SQLITE, measure_queue
from benchmarks.gateway_watch import measure_idle, measure_watchers

_QUICK = "queue,postgres,watchers,idle"


def _queue(database: str, lengths: list[int]) -> dict[str, list[Any]]:
    measured = [measure_queue(database, length) for length in lengths]
    return {
        "calls": [row for calls, _ in measured for row in calls],
        "rows": [row for _, rows in measured for row in rows],
    }


def _parts(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, list[Any]]]]:
    """What each part measures: its rows, and those of a second table."""
    lengths = [int(number) for number in args.queued.split(",")]
    few = min(args.watchers, 10)
    return {
        "queue": lambda: _queue(SQLITE, lengths),
        "postgres": lambda: _queue(POSTGRESQL, lengths[:1]),
        "watchers": lambda: {
            "rows": [measure_watchers(number, number, args.steps) for number in sorted({few, args.watchers})]
        },
        "idle": lambda: {"rows": measure_idle(args.watchers, lengths[0], args.idle_s)},
        "finished": lambda: {"rows": measure_finished(args.finished)},
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default=_QUICK, help="what is measured, comma-separated (default: %(default)s)")
    add("--queued", default="20000,200000", help="jobs in the queue; PostgreSQL has the first (default: %(default)s)")
    add("--watchers", type=int, default=1000, help="open streams of each kind (default: %(default)s)")
    add("--steps", type=int, default=20, help="steps that watchers hear of (default: %(default)s)")
    add("--idle-s", type=float, default=30.0, help="of each look at an idle gateway (default: %(default)s)")
    add("--finished", type=int, default=10_000, help="jobs that run to their end (default: %(default)s)")
    add("--save", action="store_true", help="keep the figures in benchmarks/results")
    args = parser.parse_args()
    parts = _parts(args)
    wanted = args.parts.split(",")
    if unknown := set(wanted) - parts.keys():
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, allowed is {', '.join(parts)}")
    for part in wanted:
        described = describe_run(f"gateway-{part}", torch.device("cpu"), 0, args)
        described["load_average"] = round(os.getloadavg()[0], 2)
        lists = parts[part]()
        for row in (row for rows in lists.values() for row in rows):
            sys.stdout.write(f"{part} {asdict(row)}\n")
        if args.save:
            beside = {name: [asdict(row) for row in rows] for name, rows in lists.items() if name != "rows"}
            save_result(result_path(described), described | beside, lists["rows"])


if __name__ == "__main__":
    main()
