"""Make the tables and the plot of docs/performance.md from benchmarks/results: `python -m benchmarks.report`.

Of each hardware, benchmark, clip, plan and variant the newest row counts. `--check` writes nothing and exits 1 if the
tables are not those of the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import report_gateway
from benchmarks.common import CLIPS, RESULTS
from benchmarks.reference import DEVICE, FIGURES
from benchmarks.tables import Line, newest, read_lines, sources, table
from services.fusion.model.config import RELEASED
from services.fusion.parallel.plan import ParallelPlan
from shared.memory.modes import VramMode

DOCUMENT = RESULTS.parent.parent / "docs" / "performance.md"
PLOT = DOCUMENT.with_suffix(".svg")


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


def refusal_list(folder: Path) -> str:
    """What the newest run was told of GPUs that were too small."""
    lines = read_lines(folder, "memory")
    return "\n".join(f"- {message}" for message in lines[-1].run.get("refusals", {}).values()) if lines else ""


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
    "refusals": refusal_list,
    "switching": switching_table,
    **report_gateway.TABLES,
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
