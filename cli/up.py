"""`ovi up`: all four services on this machine until told to stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
from rich.console import Console

from cli import flags
from cli.errors import EXIT_FAILED, CommandFailed, UsageProblem, errors_in_words
from cli.interrupt import Interrupted, run_interruptible
from cli.stack.checkpoints import choose_checkpoints
from cli.stack.display import StackDisplay
from cli.stack.gpus import gpus_for
from cli.stack.memory import DeviceFlags, check_flags, choose_devices
from cli.stack.plan import StackOptions, StackSecurity
from cli.stack.stack import Stack, locked_data_dir, running_stack
from cli.stack.supervisor import ServiceFailed
from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from shared.errors import EXIT_BAD_CONFIG
from shared.grpc_client import error_of
from shared.tls import Tls, common_name, is_loopback, require_protection

_DESCRIBE_TIMEOUT_S = 30.0


def up(
    data_dir: flags.DataDir = flags.DEFAULT_DATA_DIR,
    checkpoints: flags.Checkpoints = None,
    preset: flags.Preset = None,
    grpc_port: flags.GrpcPort = 50050,
    http_port: flags.HttpPort = 8000,
    host: flags.Host = "127.0.0.1",
    device: flags.Device = "auto",
    text_encoder_device: flags.TextEncoderDevice = "auto",
    gpus: flags.Gpus = "auto",
    plan: flags.Plan = "auto",
    vae_gpus: flags.VaeGpus = "auto",
    vram_mode: flags.VramModeFlag = "auto",
    tls_cert: flags.StackTlsCert = None,
    tls_key: flags.StackTlsKey = None,
    insecure: flags.StackInsecure = False,
    require_keys: flags.KeysRequired = False,
    admin_key_file: flags.AdminKeyFile = None,
) -> None:
    """Start the text encoder, fusion, VAE and gateway services, and keep them running.

    Exit status: 0 stopped by a signal; 2 a wrong flag; 3 a checkpoint that does not fit; 1 any other failure.
    """
    console = Console(highlight=False)
    with errors_in_words():
        data_dir = data_dir.resolve()
        security = _security(host, StackSecurity(tls_cert, tls_key, insecure, require_keys, admin_key_file))
        wanted = DeviceFlags(device, text_encoder_device, gpus, plan, vae_gpus, vram_mode)
        here = gpus_for(device)
        check_flags(wanted, here)
        folder = prepare_checkpoints(checkpoints, preset, data_dir, console)
        choice = choose_devices(wanted, here, folder, lambda line: say_choice(line, console))
        options = StackOptions(data_dir, folder, host, grpc_port, http_port, security=security, **vars(choice))
        try:
            run_interruptible(_serve(options, console))
        except Interrupted:
            console.print("All services have stopped.")
        except ServiceFailed as error:
            status = EXIT_BAD_CONFIG if error.exit_status == EXIT_BAD_CONFIG else EXIT_FAILED
            raise CommandFailed(str(error), exit_status=status) from None


def _security(host: str, wanted: StackSecurity) -> StackSecurity:
    """What was asked for, with whole paths.

    Raises:
        UsageProblem: it cannot be used, or does not protect where the gateway is to listen.
    """
    paths = (wanted.tls_cert, wanted.tls_key, wanted.admin_key_file)
    cert, key, admin_key_file = (None if path is None else path.resolve() for path in paths)
    try:
        tls = Tls(cert, key)
        require_protection("--host", host, tls, insecure=wanted.insecure)
        if cert is not None:
            common_name(cert)
    except ValueError as error:
        raise UsageProblem(str(error)) from None
    keys_required = wanted.keys_required or not is_loopback(host)
    return StackSecurity(cert, key, wanted.insecure, keys_required, admin_key_file)


def prepare_checkpoints(checkpoints: Path | None, preset: str | None, data_dir: Path, console: Console) -> Path:
    """`choose_checkpoints` under the data folder's lock, so that two commands never make the same files at once.

    Raises:
        UsageProblem: see there.
    """
    with locked_data_dir(data_dir):

        def say(text: str) -> None:
            console.print(text, style="yellow", soft_wrap=True, markup=False)

        return choose_checkpoints(checkpoints, preset, data_dir, say)


def say_choice(line: str, console: Console) -> None:
    """What was chosen for this machine, as it is."""
    console.print(line, style="dim", soft_wrap=True, markup=False)


async def _serve(options: StackOptions, console: Console) -> None:
    display = StackDisplay(console)
    with display:
        async with running_stack(options, display.notify) as stack:
            display.settle()
            _print_addresses(stack, await _describe_fusion(stack), console)
            await asyncio.Event().wait()  # until a signal, or a failure of the stack, cancels it


async def _describe_fusion(stack: Stack) -> fusion_pb2.DescribeModelResponse:
    fusion = next(spec for spec in stack.plan.stages if spec.name == "fusion")
    async with grpc.aio.insecure_channel(fusion.address) as channel:
        stub = fusion_pb2_grpc.FusionServiceStub(channel)
        try:
            return await stub.DescribeModel(fusion_pb2.DescribeModelRequest(), timeout=_DESCRIBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None


def _how_to_enter(options: StackOptions) -> dict[str, str]:
    if not options.security.keys_required:
        return {}
    return {"API keys": f"required: ovi keys create NAME --data-dir {options.data_dir}, then OVI_API_KEY=..."}


def _print_addresses(stack: Stack, fusion: fusion_pb2.DescribeModelResponse, console: Console) -> None:
    address, models = stack.plan.grpc_address, fusion.variants
    rows = {
        "gRPC": f"{address}  (with reflection)",
        "HTTP": stack.plan.http_url,
        "models": ", ".join(model.id for model in models if not model.problem),
        "plan": f"{stack.plan.options.plan}: {fusion.plan}",
        "memory": stack.plan.options.vram_mode.value,
        "weights": str(stack.plan.options.checkpoints),
        "logs": str(stack.plan.gateway.log_path.parent),
        **_how_to_enter(stack.plan.options),
        "try": f'ovi generate "a bell in the fog" --server {address}',
    }
    console.print("[bold green]Ready.[/] Ctrl-C stops everything.")
    for name, value in rows.items():
        console.print(f"  {name:<8} {value}", soft_wrap=True, markup=False)
    for model in models:
        if model.problem:
            console.print(f"{model.id} is not offered: {model.problem}", style="yellow", soft_wrap=True, markup=False)
