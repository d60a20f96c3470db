"""docs/performance.md says what benchmarks/results holds, and making it again changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, report_gateway
from benchmarks.common import RESULTS


def write(folder: Path, name: str, rows: list[dict[str, Any]], **run: Any) -> None:
    """A result file."""
    said = {"date": "2026-01-01", "device": "NVIDIA H200", "torch": "2.11.0", "gpus": 1}
    (folder / f"{name}.json").write_text(json.dumps(said | run | {"rows": rows}))


def step(seconds: float, **more: Any) -> dict[str, Any]:
    return {"clip": "720x720_5s", "plan": "single", "ranks": 1, "step_s": seconds} | more


def cells(markdown: str) -> list[list[str]]:
    """Rows of the first table, without its head."""
    first = markdown.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in first[2:]]


def test_document_is_up_to_date() -> None:
    document = report.DOCUMENT.read_text()
    assert report.render(document, RESULTS) == document, "run make report"


def test_document_links_the_plot() -> None:
    assert report.PLOT.is_file()
    assert f"({report.PLOT.name})" in report.DOCUMENT.read_text()


def test_rendering_again_changes_nothing_and_keeps_the_prose(tmp_path) -> None:
    write(tmp_path, "fusion_h200", [step(0.5)])
    old = "before\n" + "".join(
        f"<!-- {name}:begin -->old<!-- {name}:end -->\nprose of {name}\n" for name in report.TABLES
    )
    new = report.render(old, tmp_path)
    assert report.render(new, tmp_path) == new
    assert "old" not in new and new.startswith("before\n")
    assert all(f"-->\nprose of {name}\n" in new for name in report.TABLES)
    with pytest.raises(ValueError, match="fusion:begin"):
        report.render("no markers", tmp_path)


def test_newest_row_of_a_plan_counts_and_variants_stand_apart(tmp_path) -> None:
    write(tmp_path, "fusion_a", [step(0.7)], date="2026-01-02", time="09:00:00")
    write(tmp_path, "fusion_b", [step(0.9), step(0.4, plan="guidance 2 x sequence 1", ranks=2, alone_s=0.7)])
    write(tmp_path, "fusion_c", [step(0.6)], date="2026-01-02", time="08:00:00")
    write(tmp_path, "fusion_d", [step(0.5)], variant="fp8")
    write(tmp_path, "fusion_tiny", [step(0.1)], date="2026-02-01", preset="tiny")
    found = [(row[1], row[2], row[3]) for row in cells(report.fusion_table(tmp_path))]
    assert found == [
        ("1", "single", "**0.700**"),
        ("2", "guidance 2 x sequence 1", "**0.400**"),
        ("1", "single, fp8", "0.500"),
    ]


def test_reference_and_efficiency_stand_beside_ours(tmp_path) -> None:
    write(tmp_path, "fusion_x4", [step(0.25, plan="guidance 2 x sequence 2", ranks=4, alone_s=0.8, floor_s=0.2)])
    write(tmp_path, "fusion_other", [step(0.5)], device="NVIDIA L40")
    ours, other = sorted(cells(report.fusion_table(tmp_path)), key=lambda row: -int(row[1]))
    assert ours[5] == "0.711" and ours[8] == "80%"
    assert other[5] == "–", "the reference was measured on another GPU"
    assert "| 80% |" in report.fusion_table(tmp_path).split("\n\n")[1], "the part that the floor is of the step"


def test_result_of_the_video_decoder_is_known_by_its_name(tmp_path) -> None:
    row = {"clip": "960x960_5s", "seconds": 3.0, "tflop_per_s": 500.0, "percent_of_ceiling": 80.0, "floor_s": 2.4}
    write(tmp_path, "vae_h200_1gpu_2026-01-01", [row | {"mp4_seconds": None, "peak_gib": 9.0, "first_s": 4.0}])
    (found,) = cells(report.vae_table(tmp_path))
    assert found[:6] == ["960x960_5s", "1", "**3.000**", "–", "9.3", "3.2"]


def test_stack_rows_and_queues_of_one_run(tmp_path) -> None:
    run = {"model": "720x720_5s", "steps": 50, "i2v": False}
    row = {"run": run, "height": 704, "width": 704, "num_frames": 121, "wall_s": 12.0, "peak_gib": {}}
    queue = {"run": run, "jobs": 3, "alone_s": 36.0, "queued_s": 24.0, "gain": 1.5, "overlapped_s": 12.0}
    stage_s = {"encode_prompt": 0.5, "denoise": 7.5, "decode": 4.0}
    write(tmp_path, "stack_h200_8gpu_2026-01-01", [row | {"stage_s": stage_s}], gpus=8, queues=[queue], start_s=20.0)
    (made,) = cells(report.stack_table(tmp_path))
    assert made[1:8] == ["8", "50", "**12.0 s**", "0.50 s", "–", "7.50 s", "4.00 s"]
    (queued,) = cells(report.queue_table(tmp_path))
    assert queued[3:] == ["3", "36.0 s", "**24.0 s**", "x 1.50", "12.0 s"]


def test_memory_modes_stand_beside_standard_and_their_estimates(tmp_path) -> None:
    drift = {"error": 0.0, "cosine": 1.0}
    row = {"clip": "960x960_10s", "limit_gib": 40.0, "refused": "", "estimate_gib": 36.0, "peak_gib": 40.0}
    row |= {"step_s": 5.0, "video_drift": drift, "audio_drift": drift}
    streamed = {"mode": "streamed", "limit_gib": 11.5, "estimate_gib": 11.0, "peak_gib": 10.0, "step_s": 5.5}
    refused = {"mode": "ultra_low", "clip": "960x960_10s", "limit_gib": 3.0, "refused": "needs more"}
    switches = [{"mode": "streamed", "seconds": 12.34}]
    write(tmp_path, "memory_h200_1gpu", [row | {"mode": "standard"}, row | streamed, refused], switches=switches)
    found = {line[0]: line for line in cells(report.memory_table(tmp_path))}
    assert found["standard"][2:8] == ["40.0", "40.0", "36.0", "0.90", "5.000", "1.00"]
    assert found["streamed"][2:8] == ["11.5", "10.0", "11.0", "1.10", "5.500", "1.10"]
    assert found["ultra_low"][3] == "refused: needs more"
    assert cells(report.switching_table(tmp_path)) == [["streamed", "12.3"]]


def test_queues_of_the_gateway_stand_side_by_side(tmp_path) -> None:
    taken = {"number": 9, "p50_ms": 4.04, "p99_ms": 11.2, "max_ms": 20.0}
    rows = [
        {"database": "SQLite", "queued": queued, "call": call, "spread": taken | {"p50_ms": queued / 1e4}}
        for queued in (20_000, 200_000)
        for call in ("list", "get")
    ]
    created = {"database": "SQLite", "queued": 20_000, "api": "gRPC", "clients": 16, "per_s": 300.4, "spread": taken}
    write(tmp_path, "gateway-queue_a", [created], calls=rows, kind="gateway-queue", gpus=0, device="X, 2 cores")
    other = rows[0] | {"database": "PostgreSQL", "spread": taken}
    write(tmp_path, "gateway-postgres_a", [], calls=[other], kind="gateway-postgres", gpus=0, device="X, 2 cores")
    calls = report_gateway.calls_table(tmp_path)
    assert "SQLite, 20,000 queued | SQLite, 200,000 queued | PostgreSQL, 20,000 queued" in calls
    assert cells(calls) == [["list", "2.0 / 11", "20.0 / 11", "4.0 / 11"], ["get", "2.0 / 11", "20.0 / 11", "–"]]
    assert "`gateway-queue_a.json`: X, 2 cores, 2026-01-01" in calls
    assert cells(report_gateway.creates_table(tmp_path)) == [["gRPC", "16", "4.0 / 11 (300)"]]


def test_only_the_newest_run_of_finished_jobs_is_shown(tmp_path) -> None:
    held = {"resident_mib": 300.4, "descriptors": 49, "threads": 34}
    row = {"moment": "after", "kept": 5000, "jobs_per_s": 9.04, "processor_ms": None, "database_mib": 30.2}
    for hour, kept in ((9, 100), (8, 200)):
        rows = [row | {"kept": kept, "footprint": held}]
        write(tmp_path, f"gateway-finished_{hour}", rows, kind="gateway-finished", gpus=0, time=f"0{hour}:00:00")
    assert cells(report_gateway.finished_table(tmp_path)) == [["after", "100", "9.0", "–", "30", "300", "49", "34"]]
