"""Memory modes of a whole stack on one GPU: peak, time of a step, estimate against measured, drift, time to switch.

`python -m benchmarks.memory --checkpoints DIR [--data-dir D] [--modes standard,streamed] [--clips 720x720_5s] [--save]`

Each mode's stack is planned as if the GPU had no more memory than the mode's limit, which its services keep to; a clip
is made, and the device's used memory is sampled all the while. Then one stack without a limit is switched from mode to
mode. Drift is that of the final latents against the first mode's. With `--device cpu` no memory is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc
import pynvml
import torch
from safetensors.torch import load_file

from benchmarks.common import describe_run, result_path, save_result
from benchmarks.drift import Drift
from benchmarks.stack import Run, create, peaks
from cli.stack.gpus import gpus_for
from cli.stack.memory import DeviceChoice, DeviceFlags, choose_devices
from cli.stack.plan import StackOptions
from cli.stack.stack import running_stack
from ovi.common.v1 import system_pb2, system_pb2_grpc
from ovi.gateway.v1 import gateway_pb2 as pb
from ovi.gateway.v1 import gateway_pb2_grpc as pb_grpc
from shared.errors import OutOfMemory
from shared.memory.choose import DeviceFacts
from shared.memory.modes import VramMode
from shared.memory.stack import SPARE_PART
from shared.system_proto import vram_mode_to_proto
from shared.variants import VARIANTS

GIB = 2**30
LIMITS_GIB = {
    VramMode.STANDARD: {"960x960_10s": 40.0, "720x720_5s": 36.0},
    VramMode.STREAMED: {"960x960_10s": 11.5, "720x720_5s": 10.0},
    VramMode.FP8: {"960x960_10s": 22.0, "720x720_5s": 20.0},
    VramMode.FP8_OFFLOAD: {"960x960_10s": 15.0, "720x720_5s": 13.0},
    VramMode.ULTRA_LOW: {"960x960_10s": 7.5, "720x720_5s": 7.0},
}
"""What a stack may take of a GPU, contexts included."""
SAMPLE_S = 0.01
JOB_TIMEOUT_S = 540
SWITCH_TIMEOUT_S = 300


@dataclass(frozen=True)
class ModeRow:
    """A clip made in a mode."""

    mode: str
    clip: str
    device: str
    limit_gib: float
    refused: str
    """Why it could not be made within the limit; empty if it was. The fields below are then empty."""
    least_gib: float | None = None
    """What would have done, with more streamed and decoded in smaller tiles."""
    estimate_gib: float | None = None
    peak_gib: float | None = None
    """Most that the device's memory grew, contexts included; None on a CPU."""
    service_peaks_gib: dict[str, float] | None = None
    """Most that each service's allocator had reserved, by log event."""
    start_s: float | None = None
    step_s: float | None = None
    """Median of all steps but the first."""
    stage_s: dict[str, float] | None = None
    video_drift: Drift | None = None
    audio_drift: Drift | None = None
    same_latents_as: str = ""
    """The first of the other modes whose latents are these to the bit; empty if there is none."""
    explanation: str = ""


@dataclass(frozen=True)
class Switch:
    """One switch of a running stack."""

    mode: str
    seconds: float


class DeviceMemory:
    """Used memory of a device, sampled on a thread."""

    def __init__(self, index: int) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.base_bytes = self.used_bytes()
        self.peak_bytes = self.base_bytes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def used_bytes(self) -> int:
        """By all processes now."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, self.used_bytes())

    @classmethod
    @contextmanager
    def watched(cls, index: int | None) -> Iterator[DeviceMemory | None]:
        """Sampled within; None for a CPU."""
        if index is None:
            yield None
            return
        memory = cls(index)
        memory._thread.start()
        yield memory
        memory._stopped.set()
        memory._thread.join()


def follow(stub: pb_grpc.JobServiceStub, job_id: str) -> tuple[pb.Job, list[float]]:
    """A job to its completion, and the seconds between two steps."""
    moments: list[float] = []
    job, done = None, 0
    for answer in stub.WatchJob(pb.WatchJobRequest(id=job_id), timeout=JOB_TIMEOUT_S):
        job = answer.job
        if job.progress.stage == pb.JOB_STAGE_DENOISE and job.progress.done > done:
            moments.append(time.perf_counter())
            done = job.progress.done
    if job is None or job.state != pb.JOB_STATE_COMPLETED:
        raise SystemExit(f"the job ended otherwise: {job}")
    return job, [after - before for before, after in itertools.pairwise(moments)]


def only(clip: str, checkpoints: Path, folder: Path) -> Path:
    """A folder of links to checkpoints of which only those of a clip are there: what a stack takes, it takes for it."""
    others = {variant.file for variant in VARIANTS.values() if variant.id != clip}
    for file in checkpoints.rglob("*"):
        name = file.relative_to(checkpoints)
        if not file.is_dir() and str(name) not in others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(file)
    return folder


def plan(mode: VramMode, limit_gib: float, checkpoints: Path, device: str) -> DeviceChoice:
    """What `ovi up` would choose on this GPU if it had no more memory than that.

    Raises:
        OutOfMemory: the mode does not fit; with the numbers.
    """
    flags = DeviceFlags(device, gpus="1", vae_gpus="1", vram_mode=mode.value)
    return choose_devices(flags, limited(gpus_for(device), limit_gib), checkpoints, say)


def limited(gpus: Sequence[DeviceFacts], limit_gib: float) -> list[DeviceFacts]:
    """GPUs with at most so much memory."""
    most = int(limit_gib * GIB)
    return [replace(gpu, total_bytes=min(gpu.total_bytes, most), free_bytes=min(gpu.free_bytes, most)) for gpu in gpus]


def say(line: str) -> None:
    """Progress, for people."""
    sys.stderr.write(f"{line}\n")


async def make_clip(
    mode: VramMode, clip: str, device: str, limit_gib: float, args: argparse.Namespace
) -> tuple[ModeRow, Path]:
    """A stack in this mode and a clip; the row without drift, and the clip's latents.

    Raises:
        OutOfMemory: see `plan`.
    """
    data_dir = args.data_dir / f"{mode.value}_{clip}"
    checkpoints = only(clip, args.checkpoints, args.data_dir / f"checkpoints_{clip}")
    choice = plan(mode, limit_gib, checkpoints, device)
    options = StackOptions(data_dir, checkpoints, grpc_port=0, http_port=0, **vars(choice))
    index = None if choice.memory is None else choice.memory.gpus[0]
    with DeviceMemory.watched(index) as memory:
        begun = time.perf_counter()
        async with running_stack(options, lambda change: None) as stack:
            start_s = time.perf_counter() - begun

            def run() -> tuple[pb.Job, list[float]]:
                with grpc.insecure_channel(stack.plan.grpc_address) as channel:
                    stub = pb_grpc.JobServiceStub(channel)
                    return follow(stub, create(stub, Run(clip, args.steps, i2v=False)))

            job, seconds = await asyncio.to_thread(run)
    peak = None if memory is None else (memory.peak_bytes - memory.base_bytes) / GIB
    row = ModeRow(
        mode=mode.value,
        clip=clip,
        device=device,
        limit_gib=limit_gib,
        refused="",
        least_gib=None if choice.memory is None else choice.memory.least_bytes / GIB,
        estimate_gib=None if choice.memory is None else choice.memory.total_bytes / GIB,
        peak_gib=peak,
        service_peaks_gib=peaks(data_dir / "logs", 0)[0],
        start_s=round(start_s, 1),
        step_s=round(statistics.median(seconds), 4),
        stage_s={name: round(value, 3) for name, value in job.stage_seconds.items()},
        explanation="" if choice.memory is None else choice.memory.explanation,
    )
    (latents,) = data_dir.glob(f"**/{job.id}/latents.safetensors")
    return row, latents


async def measure_modes(
    modes: Sequence[VramMode], clips: Sequence[str], args: argparse.Namespace, keep: Callable[[list[ModeRow]], object]
) -> list[ModeRow]:
    """Every clip in every mode, each device at the next one; `keep` gets the rows so far after each."""
    made: dict[tuple[str, VramMode], tuple[ModeRow, Path | None]] = {}
    cases = list(itertools.product(clips, modes))
    waiting = iter(cases)

    def rows() -> list[ModeRow]:
        described = []
        for clip in clips:
            row_of, latents = {}, {}
            for mode in modes:
                if (clip, mode) in made:
                    row_of[mode], file = made[clip, mode]
                    if file is not None:
                        latents[mode] = load_file(file)
            described += [compared(row, mode, latents, modes[0]) for mode, row in row_of.items()]
        return described

    async def work(device: str) -> None:
        for clip, mode in waiting:
            limit_gib = LIMITS_GIB[mode][clip] if args.limits else 10_000.0
            try:
                made[clip, mode] = await make_clip(mode, clip, device, limit_gib, args)
            except OutOfMemory as error:
                made[clip, mode] = ModeRow(mode.value, clip, device, limit_gib, refused=error.message), None
            say(f"{made[clip, mode][0]}")
            keep(rows())

    await asyncio.gather(*(work(device) for device in args.devices))
    return rows()


Tensors = dict[str, torch.Tensor]


def compared(row: ModeRow, mode: VramMode, latents: Mapping[VramMode, Tensors], base: VramMode) -> ModeRow:
    """The row with the difference of its latents from those of the base, and who else has them."""
    if mode not in latents:
        return row
    ours = latents[mode]
    for other, theirs in latents.items():
        if other is not mode and all(torch.equal(ours[name], theirs[name]) for name in ours):
            row = replace(row, same_latents_as=other.value)
            break
    if base not in latents:
        return row
    names = ("video", "audio")
    video, audio = (Drift.between([(ours[f"{name}_latent"], latents[base][f"{name}_latent"])]) for name in names)
    return replace(row, video_drift=video, audio_drift=audio)


async def measure_switches(modes: Sequence[VramMode], args: argparse.Namespace) -> list[Switch]:
    """A running stack, switched from mode to mode and back to the first."""
    choice = plan(modes[0], 10_000.0, args.checkpoints, args.devices[0])
    options = StackOptions(args.data_dir / "switches", args.checkpoints, grpc_port=0, http_port=0, **vars(choice))
    switches = []
    async with (
        running_stack(options, lambda change: None) as stack,
        grpc.aio.insecure_channel(stack.plan.grpc_address) as channel,
    ):
        system = system_pb2_grpc.SystemServiceStub(channel)
        for mode in (*modes[1:], modes[0]):
            request = system_pb2.SetModeRequest(vram_mode=vram_mode_to_proto(mode))
            answer = await system.SetMode(request, timeout=SWITCH_TIMEOUT_S)
            switches.append(Switch(mode.value, round(answer.seconds, 2)))
            sys.stdout.write(f"{switches[-1]}\n")
    return switches


def refusals(modes: Sequence[VramMode], rows: Sequence[ModeRow], args: argparse.Namespace) -> dict[str, str]:
    """What is said on a GPU that is 5 % too small for a mode's clip, by mode and clip."""
    said = {}
    for row in rows:
        if row.least_gib is None or VramMode(row.mode) not in modes:
            continue
        checkpoints = only(row.clip, args.checkpoints, args.data_dir / f"checkpoints_{row.clip}")
        try:
            plan(VramMode(row.mode), 0.95 * row.least_gib / (1 - SPARE_PART), checkpoints, row.device)
        except OutOfMemory as error:
            said[f"{row.mode} {row.clip}"] = error.message
    return said


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoints", type=Path, required=True)
    add("--data-dir", type=Path, default=Path("data/benchmark_memory"))
    add(
        "--modes",
        default=",".join(mode.value for mode in LIMITS_GIB),
        help="the first is what drift is measured against",
    )
    add("--clips", default="720x720_5s,960x960_10s")
    add("--steps", type=int, default=6)
    add("--devices", default="auto", help="auto, cpu, cuda, cuda:N; or several, each with a stack of its own at a time")
    add("--limits", action=argparse.BooleanOptionalAction, default=True, help="plan for no more than the mode's limit")
    add("--switches", action=argparse.BooleanOptionalAction, default=True, help="measure switching, too")
    add("--save", action="store_true", help="keep the result in benchmarks/results")
    return parser


async def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    args.checkpoints, args.data_dir = args.checkpoints.resolve(), args.data_dir.resolve()
    args.devices = args.devices.split(",")
    modes = [VramMode(name) for name in args.modes.split(",")]

    def save(rows: list[ModeRow], **more: object) -> None:
        if args.save:
            cuda = torch.cuda.is_available() and args.devices != ["cpu"]
            described = describe_run("memory", torch.device("cuda" if cuda else "cpu"), 1, args)
            if (count := len(args.devices)) > 1:
                more["note"] = f"modes side by side on {count} GPUs of a host, a stack each; cards differ by up to 2 %"
            save_result(result_path(described), described | more, rows)

    rows = await measure_modes(modes, args.clips.split(","), args, save)
    sys.stdout.write("".join(f"{row}\n" for row in rows))
    said = refusals(modes, rows, args)
    sys.stdout.write("".join(f"{what}: {message}\n" for what, message in said.items()))
    save(rows, refusals=said)
    if args.switches:
        switches = await measure_switches(modes, args)
        save(rows, refusals=said, switches=[asdict(switch) for switch in switches])


if __name__ == "__main__":
    asyncio.run(main())
