"""The plot of docs/performance.md: seconds by number of GPUs, ours between the reference and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks.reference import DEVICE, FIGURES

if TYPE_CHECKING:
    from benchmarks.tables import Line

# Text as text and no random ids: the same results give the same file.
_STYLE: dict[Any, Any] = {"svg.hashsalt": "ovi-serve", "svg.fonttype": "none", "font.size": 9}
_GPUS = (1, 2, 4, 8)


def draw(fusion: Sequence[Line], vae: Sequence[Line], path: Path) -> None:
    """Write an SVG: a row of guided steps and one of VAE decodes, a column for each clip."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(2, len(FIGURES), sharex=True)
        for column, (clip, figures) in enumerate(FIGURES.items()):
            ours = [line for line in fusion if line.row["clip"] == clip and line.device == DEVICE]
            _panel(axes[0][column], ours, "step_s", figures.reference_step_s, figures.goal_step_s)
            axes[0][column].set_title(clip)
            ours = [line for line in vae if line.row["clip"] == clip and line.device == DEVICE]
            _panel(axes[1][column], ours, "seconds", figures.reference_decode_s, figures.goal_decode_s)
            axes[1][column].set_xlabel(f"{DEVICE} GPUs")
        axes[0][0].set_ylabel("seconds a guided step")
        axes[1][0].set_ylabel("seconds of VAE decode")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _panel(axes: Any, lines: Sequence[Line], name: str, reference: dict[int, float], goal: dict[int, float]) -> None:
    """One clip; of the plans for a number of GPUs the fastest counts."""
    plain = [line for line in lines if not line.variant]
    best = {line.gpus: line for line in sorted(plain, key=lambda line: -line.row[name])}
    floors = {gpus: line.row["floor_s"] for gpus, line in best.items() if "floor_s" in line.row}
    ours = {gpus: line.row[name] for gpus, line in best.items()}
    fp8 = {line.gpus: line.row[name] for line in lines if line.variant == "fp8"}
    kinds = (
        ("reference", reference, "s--", "tab:gray"),
        ("ours", ours, "o-", "tab:blue"),
        ("ours, fp8", fp8, "^-", "tab:green"),
        ("goal", goal, "x", "tab:orange"),
        ("floor (operations at measured rates)", floors, "_:", "black"),
    )
    for label, values, style, colour in kinds:
        gpus = sorted(values)
        axes.plot(gpus, [values[number] for number in gpus], style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(0.85, 9.5)
    axes.xaxis.set_major_locator(FixedLocator(_GPUS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major", linewidth=0.4)
