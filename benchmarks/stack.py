"""Make clips through the running services; print time and peak device memory of every stage, and what overlap gains.

`python -m benchmarks.stack --checkpoints DIR [--data-dir D] [--runs 960x960_10s:4,720x720_5s:4:i2v] [--save]`
`... --queue 3 [--queue-run 720x720_5s:50]` then makes 3 clips one after another and 3 created at once.

A run is MODEL:STEPS or MODEL:STEPS:i2v. Starts the stack of `ovi up` on free ports, creates one job after another over
gRPC, stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from PIL import Image

from benchmarks.common import describe_run, result_path, save_result
from benchmarks.spans import Span, overlapped
from cli.stack.gpus import gpus_for
from cli.stack.memory import DeviceFlags, choose_devices
from cli.stack.plan import StackOptions
from cli.stack.stack import running_stack
from ovi.common.v1 import generation_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc

JOB_TIMEOUT_S = 540
PROMPT = "A lighthouse keeper turns to us and says <S>the storm is coming<E>. Audio: wind, waves and a distant bell"


@dataclass(frozen=True)
class Run:
    """One clip to make."""

    model: str
    steps: int
    i2v: bool

    @classmethod
    def parse(cls, text: str) -> Run:
        """From MODEL:STEPS[:i2v]."""
        model, steps, *rest = text.split(":")
        return cls(model, int(steps), rest == ["i2v"])


@dataclass(frozen=True)
class Measured:
    """What a run took."""

    run: Run
    height: int
    width: int
    num_frames: int
    wall_s: float
    """From CreateJob to the finished mp4."""
    stage_s: dict[str, float]
    peak_gib: dict[str, float]
    """Most device memory a service's allocator had reserved during the run, by log event."""
    video_bytes: int


@dataclass(frozen=True)
class QueuedJob:
    """One of several jobs created at once."""

    wall_s: float
    """From the first CreateJob to this job's mp4."""
    stage_s: dict[str, float]
    """As the job tells them: waiting for the stage included."""
    busy: dict[str, list[Span]]
    """When a service worked on it, by stage, in seconds since the first CreateJob."""


@dataclass(frozen=True)
class Queue:
    """Jobs created at once, against as many made one after another in the same run."""

    run: Run
    jobs: int
    alone_s: float
    """From the first CreateJob to the last mp4, each created when the one before was done."""
    queued_s: float
    gain: float
    """alone_s / queued_s."""
    overlapped_s: float
    """Work of different stages that was done at the same time."""
    each: list[QueuedJob]


STAGE_OF_EVENT = {"prompt encoded": "encode_prompt", "denoised": "denoise", "clip decoded": "decode"}
"""What the services log at the end of their work on a job."""


def picture() -> bytes:
    """A seeded 1000x800 PNG of soft noise."""
    small = np.random.default_rng(0).integers(0, 255, (10, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((800, 1000), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def create(stub: pb_grpc.JobServiceStub, run: Run, take: str = "") -> str:
    """Queue a job of this run; its id. Another `take` is another prompt, so that no cache knows it."""
    options = generation_pb2.SamplingOptions(num_inference_steps=run.steps)
    parameters = pb.GenerationParameters(prompt=f"{PROMPT}{take}", model=run.model, options=options)
    if run.i2v:
        parameters.image_id = stub.UploadImage(iter([pb.UploadImageRequest(chunk=picture())])).image_id
    return stub.CreateJob(pb.CreateJobRequest(parameters=parameters)).job.id


def watch(stub: pb_grpc.JobServiceStub, job_id: str, timeout_s: float = JOB_TIMEOUT_S) -> pb.Job:
    """Follow a job to its completion, saying what it does."""
    job = None
    for answer in stub.WatchJob(pb.WatchJobRequest(id=job_id), timeout=timeout_s):
        job = answer.job
        progress = job.progress
        stage = pb.JobStage.Name(progress.stage).removeprefix("JOB_STAGE_").lower()
        sys.stderr.write(f"  {job_id[-4:]} {stage} {progress.done}/{progress.total}\n")
    if job is None or job.state != pb.JOB_STATE_COMPLETED:
        raise SystemExit(f"the job ended otherwise: {job}")
    return job


def log_entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of the services' logs."""
    for path in sorted(folder.glob("*.log")):
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)


def peaks(folder: Path, seen: int) -> tuple[dict[str, float], int]:
    """Peak memory by log event among the entries after the first `seen`, and how many there are now."""
    entries = [entry for entry in log_entries(folder) if entry.get("peak_device_gib") is not None]
    entries.sort(key=lambda entry: str(entry["timestamp"]))
    return {f"{e['service']}.{e['event']}": float(e["peak_device_gib"]) for e in entries[seen:]}, len(entries)


def busy_spans(entries: Iterable[dict[str, Any]], job_id: str, begin: float) -> dict[str, list[Span]]:
    """When services worked on a job, by stage, in seconds since `begin` (Unix time)."""
    spans: dict[str, list[Span]] = {}
    for entry in entries:
        stage = STAGE_OF_EVENT.get(entry["event"])
        if stage is not None and entry.get("request_id") == job_id:
            end = datetime.fromisoformat(entry["timestamp"]).timestamp() - begin
            spans.setdefault(stage, []).append((round(end - entry["seconds"], 3), round(end, 3)))
    return spans


def measure(stub: pb_grpc.JobServiceStub, run: Run, logs: Path, seen: int) -> tuple[Measured, int]:
    """Make one clip."""
    start = time.perf_counter()
    job = watch(stub, create(stub, run))
    wall = time.perf_counter() - start
    peak, seen = peaks(logs, seen)
    size = job.video.size
    measured = Measured(
        run, size.height, size.width, job.video.num_frames, round(wall, 3), stages(job), peak, job.video.num_bytes
    )
    return measured, seen


def stages(job: pb.Job) -> dict[str, float]:
    """Seconds of a job's stages in their order."""
    order = ("encode_prompt", "encode_image", "denoise", "decode")
    return {name: round(job.stage_seconds[name], 3) for name in order if name in job.stage_seconds}


def measure_queue(stub: pb_grpc.JobServiceStub, run: Run, jobs: int, logs: Path) -> Queue:
    """Make clips one after another, then as many at once."""
    start = time.perf_counter()
    for index in range(jobs):
        watch(stub, create(stub, run, f" Alone {index}."))
    alone_s = time.perf_counter() - start
    begin, start = time.time(), time.perf_counter()
    job_ids = [create(stub, run, f" Queued {index}.") for index in range(jobs)]

    def finish(job_id: str) -> tuple[pb.Job, float]:
        return watch(stub, job_id, JOB_TIMEOUT_S * jobs), round(time.perf_counter() - start, 3)

    with ThreadPoolExecutor(jobs) as threads:
        ended = list(threads.map(finish, job_ids))
    entries = list(log_entries(logs))
    each = [QueuedJob(wall_s, stages(job), busy_spans(entries, job.id, begin)) for job, wall_s in ended]
    queued_s = max(job.wall_s for job in each)
    by_stage = [[span for job in each for span in job.busy.get(stage, [])] for stage in STAGE_OF_EVENT.values()]
    gain = round(alone_s / queued_s, 3)
    return Queue(run, jobs, round(alone_s, 3), queued_s, gain, round(overlapped(by_stage), 3), each)


def measure_all(
    address: str, runs: list[Run], queue: tuple[int, Run] | None, logs: Path
) -> tuple[list[Measured], list[Queue]]:
    """Make the clips one after another, then the queue."""
    rows: list[Measured] = []
    queues: list[Queue] = []
    seen = 0
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.JobServiceStub(channel)
        for run in runs:
            row, seen = measure(stub, run, logs, seen)
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
        if queue is not None:
            queues.append(measure_queue(stub, queue[1], queue[0], logs))
            sys.stdout.write(f"{queues[-1]}\n")
    return rows, queues


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True)
    add("--data-dir", type=Path, default=Path("data/benchmark"))
    add("--runs", default="960x960_10s:4,720x720_5s:4:i2v")
    add("--queue", type=int, default=0, help="how many jobs to create at once; 0 none")
    add("--queue-run", help="what they are (default: the last of --runs)")
    add("--device", default="auto", help="of fusion and vae: auto, cpu, cuda, cuda:N")
    add("--gpus", default="auto", help="of the fusion service; ranks with --device cpu")
    add("--vram-mode", default="auto", help="how GPU memory is used")
    add("--save", action="store_true", help="keep the result in benchmarks/results")
    add("--json", type=Path, help="keep the result in this file")
    return parser


async def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    folders = (args.data_dir.resolve(), args.checkpoints.resolve())
    flags = DeviceFlags(args.device, gpus=args.gpus, vram_mode=args.vram_mode)
    choice = choose_devices(flags, gpus_for(args.device), folders[1], lambda line: sys.stdout.write(f"{line}\n"))
    options = StackOptions(*folders, grpc_port=0, http_port=0, **vars(choice))
    runs = [Run.parse(text) for text in args.runs.split(",")]
    queue = (args.queue, Run.parse(args.queue_run) if args.queue_run else runs[-1]) if args.queue else None
    start = time.perf_counter()
    async with running_stack(options, lambda change: None) as stack:
        start_s = round(time.perf_counter() - start, 1)
        sys.stdout.write(f"the stack served after {start_s} s\n")
        logs = args.data_dir / "logs"
        rows, queues = await asyncio.to_thread(measure_all, stack.plan.grpc_address, runs, queue, logs)
    if args.save or args.json:
        cuda = torch.cuda.is_available() and args.device != "cpu"
        variant = "" if args.vram_mode == "auto" else args.vram_mode
        described = describe_run("stack", torch.device("cuda" if cuda else "cpu"), choice.gpus, args, variant)
        described |= {"start_s": start_s, "queues": [asdict(one) for one in queues]}
        save_result(args.json or result_path(described), described, rows)


if __name__ == "__main__":
    asyncio.run(main())
