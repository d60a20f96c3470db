"""Make the tables and the plot of docs/performance.md from benchmarks/results: `python -m benchmarks.report`.

Of each hardware, benchmark, clip, plan and variant the newest row counts. `--check` writes nothing and exits 1 if the
tables are not those of the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import CLIPS, RESULTS
from benchmarks.reference import DEVICE, FIGURES
from services.fusion.model.config import RELEASED
from services.fusion.parallel.plan import ParallelPlan
from shared.memory.modes import VramMode

DOCUMENT = RESULTS.parent.parent / "docs" / "performance.md"
PLOT = DOCUMENT.with_suffix(".svg")
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


def clip_order(clip: str) -> int:
    """Place of a clip in tables."""
    return list(CLIPS).index(clip)


def fusion_lines(folder: Path) -> list[Line]:
    """Guided steps by hardware, clip, variant, number of GPUs and plan."""
    return newest(
        read_lines(folder, "fusion"),
        lambda line: (line.device, clip_order(line.row["clip"]), line.variant, line.gpus, line.row["plan"]),
    )


def vae_lines(folder: Path) -> list[Line]:
    """Decodes by hardware, clip, variant and number of GPUs."""
    return newest(
        read_lines(folder, "vae"),
        lambda line: (line.device, clip_order(line.row["clip"]), line.variant, line.gpus),
    )


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
        words = [f"{run['device']}, torch {run['torch']}, {run['date']}"]
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


def figure(values: dict[int, float], line: Line, *, applies: bool = True) -> str:
    """A reference figure for a line's number of GPUs; a dash if there is none for this hardware."""
    there = applies and line.device == DEVICE and line.gpus in values
    return f"{values[line.gpus]:g}" if there else "–"


def fusion_table(folder: Path) -> str:
    """Guided steps: how fast, and what stands between them and the floor."""
    lines = fusion_lines(folder)
    head = ["clip", "GPUs", "plan", "s/step", "min to max", "reference", "goal", "alone", "scaling efficiency"]
    speed = table(head, [_speed(line) for line in lines])
    head = ["clip", "GPUs", "plan", "TFLOP/s a GPU", "floor", "of the floor", "collectives (exposed)", "peak GiB"]
    return f"{speed}\n\n{table([*head, '1st, 2nd step', 'error'], [_cost(line) for line in lines])}{sources(lines)}"


def _names(line: Line) -> list[str]:
    plan = line.row["plan"] + (f", {line.variant}" if line.variant else "")
    return [line.row["clip"], str(line.gpus), plan]


def _speed(line: Line) -> list[str]:
    row, clip = line.row, FIGURES[line.row["clip"]]
    chosen = not line.variant and row["plan"] == ParallelPlan.auto(line.gpus, RELEASED.num_heads).describe()
    goal = clip.goal_fp8_step_s if line.variant == "fp8" else clip.goal_step_s
    step = line.number("step_s")
    return [
        *_names(line),
        f"**{step}**" if chosen else step,
        line.numbers("{} to {}", "min_s", "max_s"),
        figure(clip.reference_step_s, line),
        figure(goal, line, applies=line.variant in ("", "fp8")),
        line.number("alone_s"),
        "–" if row.get("alone_s") is None else f"{row['alone_s'] / line.gpus / row['step_s']:.0%}",
    ]


def _cost(line: Line) -> list[str]:
    row = line.row
    return [
        *_names(line),
        line.number("tflop_per_s_per_gpu", 0),
        line.number("floor_s"),
        "–" if row.get("floor_s") is None else f"{row['floor_s'] / row['step_s']:.0%}",
        line.numbers("{} ({})", "collective_s", "exposed_collective_s"),
        line.number("peak_gib", 1),
        line.numbers("{}, {}", "first_step_s", "second_step_s"),
        "–" if row.get("relative_error") is None else f"{row['relative_error']:.2g}",
    ]


def vae_table(folder: Path) -> str:
    """Decodes of whole clips."""
    head = ["clip", "GPUs", "decode", "to the mp4", "reference", "goal", "TFLOP/s", "of the ceiling", "floor"]
    head += ["peak GiB", "first decode"]
    rows = []
    lines = vae_lines(folder)
    for line in lines:
        clip = FIGURES[line.row["clip"]]
        rows.append(
            [
                line.row["clip"] + (f", {line.variant}" if line.variant else ""),
                str(line.gpus),
                f"**{line.number('seconds')}**",
                line.number("mp4_seconds"),
                figure(clip.reference_decode_s, line),
                figure(clip.goal_decode_s, line),
                line.number("tflop_per_s", 0),
                f"{line.number('percent_of_ceiling', 0)} %",
                line.number("floor_s"),
                line.number("peak_gib", 1),
                line.number("first_s", 1),
            ]
        )
    return table(head, rows) + sources(lines)


def stack_table(folder: Path) -> str:
    """Whole clips through the services."""
    lines = newest(
        read_lines(folder, "stack"),
        lambda line: (
            *(line.device, line.gpus, clip_order(line.row["run"]["model"])),
            *(line.row["run"]["steps"], line.row["run"]["i2v"], line.variant),
        ),
    )
    stages = {"encode_prompt": "encode prompt", "encode_image": "encode picture", "denoise": "denoise"}
    stages |= {"decode": "decode and mux"}
    head = ["clip", "GPUs", "steps", "from CreateJob to mp4", *stages.values(), "peak GiB of fusion, VAE"]
    rows = []
    for line in lines:
        run, peak = line.row["run"], line.row["peak_gib"]
        what = f"{run['model']}, {'image' if run['i2v'] else 'text'} to video, {line.row['width']}x{line.row['height']}"
        seconds = [line.row["stage_s"].get(stage) for stage in stages]
        rows.append(
            [
                f"{what}, {line.row['num_frames']} frames" + (f", {line.variant}" if line.variant else ""),
                str(line.gpus),
                str(run["steps"]),
                f"**{line.row['wall_s']:.1f} s**",
                *("–" if value is None else f"{value:.2f} s" for value in seconds),
                ", ".join(str(peak.get(event, "–")) for event in ("fusion.denoised", "vae.clip decoded")),
            ]
        )
    return table(head, rows) + sources(lines)


def queue_table(folder: Path) -> str:
    """Jobs created at once."""
    lines = newest(
        read_lines(folder, "stack", "queues"),
        lambda line: (
            *(line.device, line.gpus, clip_order(line.row["run"]["model"])),
            *(line.row["run"]["steps"], line.variant),
        ),
    )
    head = ["clip", "GPUs", "steps", "jobs", "one after another", "at once", "throughput", "work done side by side"]
    rows = [
        [
            line.row["run"]["model"] + (f", {line.variant}" if line.variant else ""),
            str(line.gpus),
            str(line.row["run"]["steps"]),
            str(line.row["jobs"]),
            f"{line.row['alone_s']:.1f} s",
            f"**{line.row['queued_s']:.1f} s**",
            f"x {line.row['gain']:.2f}",
            f"{line.row['overlapped_s']:.1f} s",
        ]
        for line in lines
    ]
    return table(head, rows) + sources(lines)


def recovery_table(folder: Path) -> str:
    """Faults in the middle of a step."""
    lines = newest(
        read_lines(folder, "recovery"),
        lambda line: (line.device, line.gpus, line.row["fault"]),
    )
    head = [
        "fault",
        "GPUs",
        "seen in the job",
        "fusion serves again",
        "job ended",
        "as",
        "attempts",
        "new processes",
        "latents",
    ]
    rows = [
        [
            line.row["fault"],
            str(line.gpus),
            *(f"{line.row[name]:.2f} s" for name in ("seen_s", "serving_s", "ended_s")),
            line.row["state"],
            str(line.row["attempts"]),
            "all" if line.row["new_processes"] else "none",
            {True: "the undisturbed", False: "others", None: ""}[line.row.get("same_latents")],
        ]
        for line in lines
    ]
    return table(head, rows) + sources(lines)


def switches_table(folder: Path) -> str:
    """What each technique gains."""
    lines = newest(
        read_lines(folder, "switches"),
        lambda line: (line.device, clip_order(line.row["clip"]), _switch_order(line), line.row["technique"]),
    )
    head = ["technique", "clip", "s/step without it", "with all", "gain", "drift"]
    rows = [
        [
            line.row["technique"],
            line.row["clip"],
            line.number("step_s"),
            line.number("all_s"),
            f"{1 - line.row['all_s'] / line.row['step_s']:.1%}",
            f"{line.row['relative_error']:.2g}",
        ]
        for line in lines
    ]
    return table(head, rows) + sources(lines)


def _switch_order(line: Line) -> float:
    """Largest gain first, the sum of all last."""
    everything = line.row["technique"].startswith("all")
    return float("inf") if everything else line.row["all_s"] - line.row["step_s"]


def drift_table(folder: Path) -> str:
    """How far results move when a run is computed in another way."""
    lines = newest(
        read_lines(folder, "drift"),
        lambda line: (
            line.device,
            clip_order(line.row["clip"]),
            line.gpus,
            line.row["step_s"] * -1,
            line.row["variant"],
        ),
    )
    head = ["way", "clip", "GPUs", "s/step", "gain", "steps reused"]
    head += [f"{what}, {tower}" for what in ("prediction", "final latents") for tower in ("video", "audio")]
    rows = []
    for line in lines:
        parts = [f"{what}_{tower}" for what in ("prediction", "final") for tower in ("video", "audio")]
        rows.append(
            [
                line.row["variant"] + (f": {line.row['plan']}" if line.row["plan"] != "single" else ""),
                line.row["clip"],
                str(line.gpus),
                line.number("step_s"),
                f"x {line.number('gain', 2)}",
                f"{line.row['steps_reused']} of {line.row['steps']}",
                *(f"{line.number(f'{part}_error', 4)} ({line.number(f'{part}_cosine', 4)})" for part in parts),
            ]
        )
    return table(head, rows) + sources(lines)


def memory_table(folder: Path) -> str:
    """What memory modes take of a GPU, and what they cost."""
    order = [mode.value for mode in VramMode]
    lines = newest(
        read_lines(folder, "memory"),
        lambda line: (line.device, clip_order(line.row["clip"]), order.index(line.row["mode"])),
    )
    standard = {(line.device, line.row["clip"]): line.row["step_s"] for line in lines if line.row["mode"] == "standard"}
    head = ["mode", "clip", "limit, GiB", "peak, GiB", "estimate, GiB", "estimate / peak", "s/step", "of standard"]
    head += ["final latents, video", "audio", "to the bit those of"]
    rows = []
    for line in lines:
        row, base = line.row, standard.get((line.device, line.row["clip"]))
        if row["refused"]:
            rows.append(
                [row["mode"], row["clip"], line.number("limit_gib", 1), f"refused: {row['refused']}", *["–"] * 7]
            )
            continue
        known = row["estimate_gib"] is not None and row["peak_gib"] is not None
        rows.append(
            [
                row["mode"],
                row["clip"],
                line.number("limit_gib", 1),
                line.number("peak_gib", 1),
                line.number("estimate_gib", 1),
                f"{row['estimate_gib'] / row['peak_gib']:.2f}" if known else "–",
                line.number("step_s"),
                f"{row['step_s'] / base:.2f}" if base else "–",
                *(f"{row[f'{tower}_drift']['error']:.2g}" for tower in ("video", "audio")),
                row.get("same_latents_as", ""),
            ]
        )
    return table(head, rows) + sources(lines)


def switching_table(folder: Path) -> str:
    """How long a running stack takes to change its mode."""
    lines = newest(read_lines(folder, "memory", "switches"), lambda line: (line.device, line.row["mode"]))
    return table(["to", "s"], [[line.row["mode"], line.number("seconds", 1)] for line in lines]) + sources(lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "fusion": fusion_table,
    "switches": switches_table,
    "drift": drift_table,
    "vae": vae_table,
    "stack": stack_table,
    "queue": queue_table,
    "recovery": recovery_table,
    "memory": memory_table,
    "switching": switching_table,
}


def render(document: str, folder: Path) -> str:
    """The document with every table between its markers made anew.

    Raises:
        ValueError: a marker is missing.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = document.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{begin} and {end} must stand in the document")
        document = f"{before}{begin}\n{make(folder)}\n{end}{after}"
    return document


def main() -> None:
    """Write tables and plot, or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = DOCUMENT.read_text()
    new = render(old, RESULTS)
    if args.check:
        raise SystemExit(None if new == old else f"{DOCUMENT.name} is not what the results say; run make report")
    from benchmarks.plot import draw

    DOCUMENT.write_text(new)
    draw(fusion_lines(RESULTS), vae_lines(RESULTS), PLOT)


if __name__ == "__main__":
    main()
