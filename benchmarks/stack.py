"""Make clips through the running services and print time and peak device memory of every stage.

`python -m benchmarks.stack --checkpoints DIR [--data-dir D] [--runs 960x960_10s:4,720x720_5s:4:i2v] [--gpus N]`

A run is MODEL:STEPS or MODEL:STEPS:i2v. Starts the stack of `ovi up` on free ports, creates one job after another over
gRPC, stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np
import torch
from PIL import Image

from cli.stack.gpus import choose_gpus
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


def picture() -> bytes:
    """A seeded 1000x800 PNG of soft noise."""
    small = np.random.default_rng(0).integers(0, 255, (10, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((800, 1000), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def watch(stub: pb_grpc.JobServiceStub, job_id: str) -> pb.Job:
    """Follow a job to its end, saying what it does."""
    job = None
    for answer in stub.WatchJob(pb.WatchJobRequest(id=job_id), timeout=JOB_TIMEOUT_S):
        job = answer.job
        progress = job.progress
        stage = pb.JobStage.Name(progress.stage).removeprefix("JOB_STAGE_").lower()
        sys.stderr.write(f"  {stage} {progress.done}/{progress.total}\n")
    if job is None or job.state != pb.JOB_STATE_COMPLETED:
        raise SystemExit(f"the job ended otherwise: {job}")
    return job


def log_entries(folder: Path) -> Iterator[dict[str, object]]:
    """Every line of the services' logs."""
    for path in sorted(folder.glob("*.log")):
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)


def peaks(folder: Path, seen: int) -> tuple[dict[str, float], int]:
    """Peak memory by log event among the entries after the first `seen`, and how many there are now."""
    entries = [entry for entry in log_entries(folder) if entry.get("peak_device_gib") is not None]
    entries.sort(key=lambda entry: str(entry["timestamp"]))
    return {f"{e['service']}.{e['event']}": float(str(e["peak_device_gib"])) for e in entries[seen:]}, len(entries)


def measure(stub: pb_grpc.JobServiceStub, run: Run, logs: Path, seen: int) -> tuple[Measured, int]:
    """Make one clip."""
    options = generation_pb2.SamplingOptions(num_inference_steps=run.steps)
    parameters = pb.GenerationParameters(prompt=PROMPT, model=run.model, options=options)
    if run.i2v:
        parameters.image_id = stub.UploadImage(iter([pb.UploadImageRequest(chunk=picture())])).image_id
    start = time.perf_counter()
    job = watch(stub, stub.CreateJob(pb.CreateJobRequest(parameters=parameters)).job.id)
    wall = time.perf_counter() - start
    peak, seen = peaks(logs, seen)
    size = job.video.size
    stages = {name: round(seconds, 3) for name, seconds in job.stage_seconds.items()}
    measured = Measured(
        run, size.height, size.width, job.video.num_frames, round(wall, 3), stages, peak, job.video.num_bytes
    )
    return measured, seen


def measure_all(address: str, runs: list[Run], logs: Path) -> list[Measured]:
    """Make the clips one after another."""
    rows: list[Measured] = []
    seen = 0
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.JobServiceStub(channel)
        for run in runs:
            row, seen = measure(stub, run, logs, seen)
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    return rows


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("data/benchmark"))
    parser.add_argument("--runs", default="960x960_10s:4,720x720_5s:4:i2v")
    parser.add_argument("--gpus", default="auto", help="of the fusion service")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gpus = choose_gpus(args.gpus, "auto")
    options = StackOptions(args.data_dir.resolve(), args.checkpoints.resolve(), grpc_port=0, http_port=0, gpus=gpus)
    start = time.perf_counter()
    async with running_stack(options, lambda change: None) as stack:
        start_s = round(time.perf_counter() - start, 1)
        sys.stdout.write(f"the stack served after {start_s} s\n")
        runs = [Run.parse(text) for text in args.runs.split(",")]
        rows = await asyncio.to_thread(measure_all, stack.plan.grpc_address, runs, args.data_dir / "logs")
    if args.json:
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        result = {"date": date, "device": device, "torch": torch.__version__, "gpus": gpus, "start_s": start_s}
        args.json.write_text(json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
