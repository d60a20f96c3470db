"""`make chaos`: the long storms, with what came of them; about ten minutes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.storm import Plan, Storm, check
from tests.postgres import running_postgres


def main() -> None:
    """Run both storms; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="of each storm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is left to chance")
    args = parser.parse_args()
    for name, gateways, blows in (("SQLite, one gateway", 1, 20), ("PostgreSQL, three gateways", 3, 24)):
        plan = Plan(args.jobs, gateways, pause_s=3.0, blows=blows, limit_s=900.0, seed=args.seed)
        with tempfile.TemporaryDirectory() as folder:
            if gateways == 1:
                report = Storm(Path(folder), plan, None).run()
            else:
                with running_postgres() as postgres:
                    report = Storm(Path(folder), plan, postgres).run()
        sys.stdout.write("\n  ".join([name, *report.lines()]) + "\n")
        sys.stdout.flush()
        check(report, plan)


if __name__ == "__main__":
    main()
