"""`ovi jobs`: what a gateway has, and what to do with it."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import flags
from cli.client import ENDED, GatewayClient, run_with_client
from cli.errors import EXIT_FAILED, CommandFailed, UsageProblem, errors_in_words
from cli.progress import job_view
from cli.words import STAGES, STATE_STYLES, as_dict, describe_video, state_word
from ovi.gateway.v1 import gateway_pb2 as pb
from shared.memory.modes import RECIPES, VramMode
from shared.system_proto import vram_mode_from_proto

jobs_app = typer.Typer(
    help="List, show, watch, pause, cancel, delete and download jobs of a gateway.", no_args_is_help=True
)

JobId = Annotated[str, typer.Argument(metavar="ID", help="Job id; `ovi jobs list` shows them.")]
T = TypeVar("T")


@jobs_app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None,
        typer.Option(help="Only these: queued, paused, running, completed, failed, cancelled; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show.")] = 50,
    server: flags.Server = flags.DEFAULT_SERVER,
    as_json: flags.Json = False,
) -> None:
    """The newest jobs first."""
    with errors_in_words():
        states = [_state(word) for word in state or []]
        jobs = run_with_client(server, lambda client: client.list(states, limit))
        if as_json:
            for job in jobs:
                _print_json(job)
            return
        table = Table(box=None, header_style="dim", pad_edge=False)
        for heading in ("id", "state", "created", "took", "prompt"):
            # The prompt's column may shrink, and its text is then cut; ids stay whole, to be copied.
            table.add_column(heading, no_wrap=heading != "prompt")
        for job in jobs:
            took = _seconds(job)
            part = f" {job.progress.fraction:.0%}" if job.state == pb.JOB_STATE_RUNNING else ""
            table.add_row(
                job.id,
                Text(state_word(job.state) + part, style=STATE_STYLES.get(job.state, "")),
                _local_time(job.create_time.ToDatetime(UTC))[5:16],
                "" if took is None else f"{took:.0f} s",
                Text(job.parameters.prompt[:200], no_wrap=True, overflow="ellipsis"),
            )
        Console().print(table if jobs else "No jobs.")


@jobs_app.command()
def show(job_id: JobId, server: flags.Server = flags.DEFAULT_SERVER, as_json: flags.Json = False) -> None:
    """Everything known of a job."""
    with errors_in_words():
        _print_job(run_with_client(server, lambda client: client.get(job_id)), as_json)


@jobs_app.command()
def watch(job_id: JobId, server: flags.Server = flags.DEFAULT_SERVER, as_json: flags.Json = False) -> None:
    """Follow a job to its end. Exit status 0 if it completed. Ctrl-C leaves the job running."""
    console = Console(highlight=False)

    async def follow(client: GatewayClient) -> pb.Job:
        job = pb.Job()
        if as_json:
            async for job in client.watch(job_id):
                _print_json(job)
            return job
        with job_view(console) as view:
            async for job in client.watch(job_id):
                view.show(job)
        return job

    with errors_in_words():
        job = run_with_client(server, follow)
        if not as_json:
            _print_job(job, as_json=False)
        if job.state != pb.JOB_STATE_COMPLETED:
            raise typer.Exit(EXIT_FAILED)


@jobs_app.command()
def cancel(job_id: JobId, server: flags.Server = flags.DEFAULT_SERVER, as_json: flags.Json = False) -> None:
    """Stop a job; one that runs ends after its present step."""
    with errors_in_words():
        job = run_with_client(server, lambda client: client.cancel(job_id))
        if as_json:
            _print_json(job)
        elif job.state in ENDED:
            typer.echo(f"{job.id} is {state_word(job.state)}")
        else:
            typer.echo(f"{job.id} stops after its present step")


@jobs_app.command()
def pause(job_id: JobId, server: flags.Server = flags.DEFAULT_SERVER, as_json: flags.Json = False) -> None:
    """Set a job aside: a queued one is not begun, a running one keeps what it has made."""
    with errors_in_words():
        _tell(run_with_client(server, lambda client: client.pause(job_id)), as_json)


@jobs_app.command()
def resume(job_id: JobId, server: flags.Server = flags.DEFAULT_SERVER, as_json: flags.Json = False) -> None:
    """Put a paused job back into the queue."""
    with errors_in_words():
        _tell(run_with_client(server, lambda client: client.resume(job_id)), as_json)


@jobs_app.command()
def batch(
    table: Annotated[Path, typer.Argument(help="CSV or TSV with the columns text_prompt and, if wanted, image_path.")],
    samples: Annotated[int, typer.Option(min=1, help="Clips of each prompt, with seeds counted up.")] = 1,
    steps: Annotated[int, typer.Option(help="Solver steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the first clip of each prompt.")] = 100,
    model: Annotated[str, typer.Option(help="Variant; default the server's first.", show_default=False)] = "",
    priority: flags.Priority = flags.DEFAULT_PRIORITY,
    server: flags.Server = flags.DEFAULT_SERVER,
    as_json: flags.Json = False,
) -> None:
    """Queue a job for every row of a table: all of them, or none if one is wrong."""
    with errors_in_words():
        try:
            rows = table.read_bytes()
        except OSError as error:
            raise UsageProblem(f"{table} cannot be read ({error.strerror})") from None
        template = pb.GenerationParameters(model=model)
        template.options.num_inference_steps, template.options.seed = steps, seed
        request = pb.BatchCreateRequest(
            request_id=uuid.uuid4().hex, table=rows, template=template, samples_per_prompt=samples, priority=priority
        )
        made = run_with_client(server, lambda client: client.create_batch(request))
        if as_json:
            _print_json(made)
            return
        for job_id in made.job_ids:
            typer.echo(job_id)


@jobs_app.command()
def delete(job_id: JobId, server: flags.Server = flags.DEFAULT_SERVER) -> None:
    """Delete an ended job, its clip and its latents."""
    with errors_in_words():
        run_with_client(server, lambda client: client.delete(job_id))
        typer.echo(f"{job_id} is deleted")


@jobs_app.command()
def download(
    job_id: JobId,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The mp4; default ID.mp4.", show_default=False)
    ] = None,
    server: flags.Server = flags.DEFAULT_SERVER,
) -> None:
    """Fetch a completed job's clip."""
    path = out or Path(f"{job_id}.mp4")

    async def fetch(client: GatewayClient) -> pb.Job:
        job = await client.get(job_id)
        if job.state != pb.JOB_STATE_COMPLETED:
            raise CommandFailed(f"job {job_id} is {state_word(job.state)}; only a completed job has a clip")
        await client.download(job, path)
        return job

    with errors_in_words():
        try:
            job = run_with_client(server, fetch)
        except OSError as error:
            raise UsageProblem(f"--out: {path} cannot be written ({error.strerror})") from None
        typer.echo(f"{path}  {describe_video(job.video)}")


def _tell(job: pb.Job, as_json: bool) -> None:
    if as_json:
        _print_json(job)
    else:
        typer.echo(f"{job.id} is {state_word(job.state)}")


def _state(word: str) -> pb.JobState.ValueType:
    name = f"JOB_STATE_{word.upper()}"
    if name not in pb.JobState.keys() or name == "JOB_STATE_UNSPECIFIED":  # noqa: SIM118 (an enum wrapper, no dict)
        allowed = ", ".join(state_word(state) for state in STATE_STYLES)
        raise UsageProblem(f"--state: got {word!r}, allowed is {allowed}")
    return pb.JobState.Value(name)


def _print_json(message: Message) -> None:
    typer.echo(json.dumps(as_dict(message), ensure_ascii=False))


def _print_job(job: pb.Job, as_json: bool) -> None:
    if as_json:
        _print_json(job)
        return
    parameters, options = job.parameters, job.parameters.options
    rows = {
        "id": job.id,
        "state": state_word(job.state) + (f" (attempt {job.attempts})" if job.attempts > 1 else ""),
        "prompt": parameters.prompt,
        "model": f"{parameters.model}, {parameters.width}x{parameters.height}, {parameters.num_frames} frames",
        "sampling": (
            f"{options.num_inference_steps} steps, seed {options.seed}, guidance {options.video_guidance_scale:g} /"
            f" {options.audio_guidance_scale:g}, shift {options.flow_shift:g}, skipped block {options.slg_layer}"
        ),
        "step cache": _step_cache(job),
        "memory": _memory(job),
        "created": _local_time(job.create_time.ToDatetime(UTC)),
        "stages": ", ".join(
            f"{name} {job.stage_seconds[key]:.1f} s" for key, name, _ in STAGES.values() if key in job.stage_seconds
        ),
        "priority": str(job.priority),
        "progress": f"{job.progress.fraction:.0%}" if job.state not in ENDED else "",
        "expected": _expected(job),
        "begun again": "; ".join(_setback(setback) for setback in job.setbacks),
        "error": f"{job.error.message} ({job.error.code})" if job.HasField("error") else "",
        "video": f"{describe_video(job.video)}, {job.video.url_path}" if job.HasField("video") else "",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            grid.add_row(Text(name, style="dim"), Text(value))
    Console(highlight=False).print(grid)


def _setback(setback: pb.Setback) -> str:
    """Why, and where it was, if the reason does not say that itself."""
    if not setback.worker or setback.worker in setback.reason:
        return setback.reason
    return f"{setback.reason} ({setback.worker})"


def _step_cache(job: pb.Job) -> str:
    threshold = job.parameters.options.step_cache_threshold
    if not threshold:
        return ""
    return f"threshold {threshold:g}" + (f", {job.video.steps_reused} steps reused" if job.HasField("video") else "")


def _memory(job: pb.Job) -> str:
    """The mode that was asked for, if one was, and the one the clip was made in."""
    asked, used = (
        vram_mode_from_proto(mode, field="vram_mode") for mode in (job.parameters.vram_mode, job.video.vram_mode)
    )
    if used is VramMode.AUTO:
        return "" if asked is VramMode.AUTO else f"{asked.value} asked for"
    lossy = "" if RECIPES[used].lossless else ", lossy"
    instead = f", instead of {asked.value}" if asked not in (VramMode.AUTO, used) else ""
    return f"{used.value}{lossy}{instead}"


def _expected(job: pb.Job) -> str:
    """Of a job that waits or runs: its place, and when it is done."""
    if not job.HasField("estimate"):
        return ""
    estimate = job.estimate
    words = [f"{estimate.position} before it"] if job.state == pb.JOB_STATE_QUEUED else []
    if estimate.HasField("end_time"):
        words.append(f"done about {_local_time(estimate.end_time.ToDatetime(UTC))}")
    return ", ".join(words)


def _seconds(job: pb.Job) -> float | None:
    if not job.HasField("start_time"):
        return None
    end = job.end_time.ToDatetime(UTC) if job.HasField("end_time") else datetime.now(UTC)
    return (end - job.start_time.ToDatetime(UTC)).total_seconds()


def _local_time(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
