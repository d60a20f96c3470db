"""Rows of result files, and Markdown tables of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTHING = "No result is kept in `benchmarks/results/` yet."


@dataclass(frozen=True)
class Line:
    """A row of a result file, and what the file says of itself."""

    file: str
    run: dict[str, Any]
    row: dict[str, Any]

    @property
    def device(self) -> str:
        """Name of the hardware."""
        return str(self.run["device"])

    @property
    def variant(self) -> str:
        """Switches that differ from what the services choose; empty for none."""
        return str(self.run.get("variant", ""))

    @property
    def gpus(self) -> int:
        """How many took part."""
        return int(self.row.get("ranks", self.run.get("gpus", 1)))

    @property
    def moment(self) -> tuple[str, str]:
        """When it was measured."""
        return self.run["date"], self.run.get("time", "")

    def number(self, name: str, digits: int = 3) -> str:
        """A value of the row for a table; a dash if it was not measured."""
        value = self.row.get(name)
        return "–" if value is None else f"{value:.{digits}f}"

    def numbers(self, form: str, *names: str) -> str:
        """Values of the row in words; a dash if they were not measured."""
        there = all(self.row.get(name) is not None for name in names)
        return form.format(*map(self.number, names)) if there else "–"


def read_lines(folder: Path, kind: str, list_name: str = "rows") -> list[Line]:
    """The rows of every result file of this kind (what it says, else the first word of its name), oldest first."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if run.get("kind", path.stem.split("_")[0]) == kind and run.get("preset", "full") == "full":
            lines += [Line(path.name, run, row) for row in run.get(list_name, [])]
    return sorted(lines, key=lambda line: line.moment)


def newest(lines: Iterable[Line], key: Callable[[Line], tuple[Any, ...]]) -> list[Line]:
    """The last line of each key, in the order of the keys."""
    kept = {key(line): line for line in lines}
    return [kept[key] for key in sorted(kept)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; a sentence without rows."""
    if not rows:
        return NOTHING
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sources(lines: list[Line]) -> str:
    """Where the rows come from, a line for each file."""
    runs = {line.file: line.run for line in lines}
    found = []
    for file, run in sorted(runs.items()):
        torch = f", torch {run['torch']}" if run.get("gpus", 1) else ""
        words = [f"{run['device']}{torch}, {run['date']}"]
        words += [f"load average {run['load_average']:.1f} before"] if "load_average" in run else []
        words += [run["kernels"]] if "kernels" in run else []
        rates = run.get("rates", {})
        if "product_flop_per_s" in rates:
            ceilings = ", ".join(
                f"{name} {rates[f'{key}_flop_per_s'] / 1e12:.0f} TFLOP/s"
                for name, key in (("products", "product"), ("attention", "attention"), ("fp8 products", "fp8_product"))
                if rates.get(f"{key}_flop_per_s")
            )
            words.append(f"ceilings in this run: {ceilings}, copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s")
        if "model_made_s" in run:
            words.append(f"model with random weights made in {run['model_made_s']:.1f} s")
        if "note" in run:
            words.append(run["note"])
        if "start_s" in run:
            words.append(f"stack serving after {run['start_s']:.1f} s")
        found.append(f"- `{file}`: {'; '.join(words)}")
    return "\n\n" + "\n".join(found) if found else ""
