"""`ovi generate`: a prompt in, an mp4 out."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cli import flags
from cli.client import GatewayClient
from cli.connection import Connection, chosen_connection
from cli.errors import EXIT_INTERRUPTED, CommandFailed, UsageProblem, errors_in_words
from cli.interrupt import Interrupted, run_interruptible
from cli.progress import job_view
from cli.stack.display import StackDisplay
from cli.stack.gpus import gpus_for, parse_mode
from cli.stack.memory import DeviceFlags, check_flags, choose_devices
from cli.stack.plan import StackOptions
from cli.stack.stack import live_stack, running_stack
from cli.stack.supervisor import ServiceFailed
from cli.up import prepare_checkpoints, say_choice
from cli.words import describe_video, state_word
from ovi.common.v1 import generation_pb2 as common_pb
from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import InvalidRequest, OviError
from shared.pictures import open_picture
from shared.sampling_options import SamplingOptions, Solver, check_sampling_options
from shared.system_proto import vram_mode_to_proto

_EMBEDDED_GRACE_S = 5.0
_CANCEL_PATIENCE_S = 15.0
_MAX_LAYERS = 2**31
"""The number of blocks is the model's to know; the gateway checks slg_layer against it."""
_SOLVERS = {
    Solver.UNIPC: common_pb.SOLVER_UNIPC,
    Solver.DPMPP: common_pb.SOLVER_DPMPP,
    Solver.EULER: common_pb.SOLVER_EULER,
}


class _SolverName(enum.StrEnum):
    UNIPC = Solver.UNIPC.value
    DPMPP = Solver.DPMPP.value
    EULER = Solver.EULER.value


@dataclass(frozen=True)
class _Wanted:
    """What to make and where to put it; checked as far as this end can."""

    parameters: pb.GenerationParameters
    picture: bytes | None
    out: Path
    priority: int


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show; speech between <S> and <E>, sound after 'Audio:'.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The mp4; replaced if it exists.")] = Path("clip.mp4"),
    image: Annotated[Path | None, typer.Option(help="First picture: PNG, JPEG or WebP.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed makes the same clip.")] = 100,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, of the model's area.", show_default=False)] = None,
    model: Annotated[str, typer.Option(help="Variant; default the server's first.", show_default=False)] = "",
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.", show_default=False)] = None,
    audio_negative_prompt: Annotated[str | None, typer.Option(help="What not to sound.", show_default=False)] = None,
    guidance: Annotated[float, typer.Option(help="Guidance of the video; 1 is none.")] = 4.0,
    audio_guidance: Annotated[float, typer.Option(help="Guidance of the sound; 1 is none.")] = 3.0,
    shift: Annotated[float, typer.Option(help="Shift of the noise schedule.")] = 5.0,
    solver: Annotated[_SolverName, typer.Option(help="Of the flow.")] = _SolverName.UNIPC,
    slg_layer: Annotated[int, typer.Option(help="Block left out of the negative pass; 0: none.")] = 11,
    step_cache: Annotated[
        float, typer.Option(help="Reuse steps whose first block changes by less than this part; lossy; 0: none.")
    ] = 0.0,
    server: Annotated[
        str | None,
        typer.Option(envvar="OVI_SERVER", help="HOST:PORT of a gateway. Default: one started for this clip."),
    ] = None,
    data_dir: flags.DataDir = flags.DEFAULT_DATA_DIR,
    checkpoints: flags.Checkpoints = None,
    preset: flags.Preset = None,
    device: flags.Device = "auto",
    text_encoder_device: flags.TextEncoderDevice = "auto",
    gpus: flags.Gpus = "auto",
    plan: flags.Plan = "auto",
    vram_mode: flags.VramModeFlag = "auto",
    priority: flags.Priority = flags.DEFAULT_PRIORITY,
) -> None:
    """Make a clip. Without --server, uses the stack that runs on the data folder, or starts one for this clip alone.

    Exit status: 0 the clip is there; 2 wrong input; 1 it could not be made; 130 interrupted, the job cancelled.
    """
    console = Console(highlight=False)
    options = SamplingOptions(steps, guidance, audio_guidance, shift, Solver(solver.value), slg_layer, seed, step_cache)
    with errors_in_words():
        parameters = pb.GenerationParameters(prompt=prompt, model=model, options=_to_proto(options))
        if negative_prompt is not None:
            parameters.video_negative_prompt = negative_prompt
        if audio_negative_prompt is not None:
            parameters.audio_negative_prompt = audio_negative_prompt
        # Without one, the services keep to theirs.
        parameters.vram_mode = vram_mode_to_proto(parse_mode(vram_mode))
        if size is not None:
            parameters.width, parameters.height = parse_size(size)
        wanted = _Wanted(parameters, None if image is None else _read_picture(image), _writable(out), priority)
        folder = data_dir.resolve()
        devices = DeviceFlags(device, text_encoder_device, gpus, plan, vram_mode=vram_mode)
        started = StackRequest(folder, checkpoints, preset, devices)
        try:
            run_interruptible(_generate(wanted, server, started, console))
        except Interrupted:
            raise CommandFailed("Interrupted; no clip was made.", exit_status=EXIT_INTERRUPTED) from None
        except ServiceFailed as error:
            raise CommandFailed(str(error)) from None


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT".

    Raises:
        UsageProblem: anything else.
    """
    match = re.fullmatch(r"(\d{1,5})\s*[xX×]\s*(\d{1,5})", text.strip())
    if match is None:
        raise UsageProblem(f"--size: got {text!r}, allowed is WIDTHxHEIGHT in pixels, for example 960x544")
    return int(match[1]), int(match[2])


def _to_proto(options: SamplingOptions) -> common_pb.SamplingOptions:
    violations = check_sampling_options(options, num_layers=_MAX_LAYERS, prefix="")
    if violations:
        raise InvalidRequest(violations)
    return common_pb.SamplingOptions(
        num_inference_steps=options.num_inference_steps,
        video_guidance_scale=options.video_guidance_scale,
        audio_guidance_scale=options.audio_guidance_scale,
        flow_shift=options.flow_shift,
        solver=_SOLVERS[options.solver],
        slg_layer=options.slg_layer,
        seed=options.seed,
        step_cache_threshold=options.step_cache_threshold,
    )


def _read_picture(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageProblem(f"--image: {path} cannot be read ({error.strerror})") from None
    open_picture(data, field="image")
    return data


def _writable(out: Path) -> Path:
    folder = out.parent
    if out.is_dir():
        raise UsageProblem(f"--out: {out} is a folder; name a file in it, for example {out / 'clip.mp4'}")
    if not folder.is_dir():
        raise UsageProblem(f"--out: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UsageProblem(f"--out: the folder {folder} cannot be written")
    return out


@dataclass(frozen=True)
class StackRequest:
    """The flags for a stack of one's own."""

    data_dir: Path
    checkpoints: Path | None
    preset: str | None
    devices: DeviceFlags

    @property
    def is_particular(self) -> bool:
        """True if any flag asks for something a running stack may not be. A mode is of a job, too."""
        ordinary = DeviceFlags(vram_mode=self.devices.vram_mode)
        return bool(self.checkpoints or self.preset or self.devices != ordinary)


@contextlib.asynccontextmanager
async def gateway_client(server: str | None, request: StackRequest, console: Console) -> AsyncIterator[GatewayClient]:
    """Of the server named; else of the stack that runs on the data folder; else of one of our own, stopped at the end.

    Raises:
        UsageProblem: a running stack where flags ask for a particular one.
        ServiceFailed: a service of our own stack cannot run.
    """
    if server is not None:
        async with GatewayClient(server) as client:
            yield client
        return
    running = live_stack(request.data_dir)
    if running is not None:
        address = str(running["grpc_address"])
        if request.is_particular:
            raise UsageProblem(
                f"--data-dir: a stack runs on {request.data_dir} already; use it with --server {address},"
                " or choose another folder for one with these flags"
            )
        note = f"Using the stack that runs on {request.data_dir} ({address})."
        console.print(note, style="dim", soft_wrap=True, markup=False)
        cert = running.get("tls_cert")
        own = Connection.of_own_stack(Path(cert) if cert else None, chosen_connection().api_key)
        async with GatewayClient(address, own) as client:
            yield client
        return
    here = gpus_for(request.devices.device)
    check_flags(request.devices, here)
    folder = prepare_checkpoints(request.checkpoints, request.preset, request.data_dir, console)
    choice = choose_devices(request.devices, here, folder, lambda line: say_choice(line, console))
    options = StackOptions(
        request.data_dir, folder, grpc_port=0, http_port=0, grace_s=_EMBEDDED_GRACE_S, **vars(choice)
    )
    with StackDisplay(console, brief=True) as display:
        async with running_stack(options, display.notify) as stack:
            display.settle()
            async with GatewayClient(stack.plan.grpc_address, Connection()) as client:
                yield client


async def _generate(wanted: _Wanted, server: str | None, request: StackRequest, console: Console) -> None:
    async with gateway_client(server, request, console) as client:
        if wanted.picture is not None:
            wanted.parameters.image_id = await client.upload_image(wanted.picture)
        # An id of our own, so that gRPC's transparent retries make no second job.
        job = await client.create(_request(wanted))
        job_id = job.id
        try:
            with job_view(console) as view:
                async for job in client.watch(job_id):
                    view.show(job)
        except asyncio.CancelledError:
            await _cancel(client, job_id, console)
            raise
        if job.state != pb.JOB_STATE_COMPLETED:
            raise CommandFailed(_why(job))
        try:
            await client.download(job, wanted.out)
        except OSError as error:
            raise CommandFailed(f"--out: {wanted.out} cannot be written ({error.strerror})") from None
    done = Text("✓ ", style="green")
    done.append(str(wanted.out), style="bold default")
    done.append(f"  {describe_video(job.video)}, seed {job.parameters.options.seed}", style="dim default")
    console.print(done, soft_wrap=True)


def _request(wanted: _Wanted) -> pb.CreateJobRequest:
    return pb.CreateJobRequest(request_id=uuid.uuid4().hex, parameters=wanted.parameters, priority=wanted.priority)


async def _cancel(client: GatewayClient, job_id: str, console: Console) -> None:
    console.print(f"Cancelling job {job_id} (again Ctrl-C to leave at once).", soft_wrap=True)
    try:
        async with asyncio.timeout(_CANCEL_PATIENCE_S):
            await client.cancel(job_id)
            async for _ in client.watch(job_id):
                pass
    except (OviError, TimeoutError) as error:
        console.print(f"It could not be cancelled: {error or 'no answer'}", style="red", markup=False, soft_wrap=True)


def _why(job: pb.Job) -> str:
    if job.state == pb.JOB_STATE_FAILED:
        return f"job {job.id} failed: {job.error.message} ({job.error.code})"
    return f"job {job.id} is {state_word(job.state)}"
