"""The VAE service: `python -m services.vae --checkpoints DIR`, or the same through torchrun with a rank a GPU."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from ovi.vae.v1 import vae_pb2, vae_pb2_grpc
from services.vae.config import VaeOptions
from services.vae.engine import VaeEngine
from services.vae.group import join_decoders, load_leader, run_follower
from services.vae.memory import VaeMemory, mode_problem
from services.vae.ops import Kernels
from services.vae.request import MAX_LATENT_FRAMES
from services.vae.scratch import remove_abandoned
from services.vae.servicer import VaeServicer
from shared.death_signal import die_with_parent
from shared.device_worker import DeviceWorker
from shared.errors import EXIT_BAD_CONFIG
from shared.group.ranks import Ranks, end_torchrun, rank_device, require_protected_group
from shared.group.steps import stop_followers
from shared.grpc_server import GrpcService, serve
from shared.logging import configure_logging, get_logger
from shared.memory.devices import Devices
from shared.memory.watcher import DeviceWatcher, own_devices
from shared.service_main import refusing_bad_checkpoints, run_service, stage_options, stage_parser
from shared.system_service import system_service
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver

DEFAULT_PORT = 50053


async def run(options: VaeOptions) -> None:
    """Load the networks, serve until a signal: the only rank, or rank 0 of several."""
    remove_abandoned()
    stage = options.stage
    fellowship = join_decoders(options) if options.ranks.world_size > 1 else None
    engines: list[VaeEngine] = []
    worker = DeviceWorker("vae", max_pending=stage.max_pending, device=stage.device)
    store = TensorStore(lease_s=stage.lease_s, max_bytes=stage.tensor_store_bytes)
    tensors = stage.tensor_server(store)
    resolver = TensorResolver.over_grpc(stage.producer_hosts, stage.listen.tls)
    servicer = VaeServicer(lambda: engines[0], worker, resolver, tensors, options)
    watcher = DeviceWatcher(own_devices(Devices()))
    services = [
        GrpcService(
            vae_pb2.DESCRIPTOR.services_by_name["VaeService"].full_name,
            lambda server: vae_pb2_grpc.add_VaeServiceServicer_to_server(servicer, server),
        ),
        system_service(watcher, servicer.plan, servicer.set_mode, servicer.describe, device=str(stage.device)),
    ]

    async def load() -> None:
        await watcher.start()
        memory = await worker.run(lambda: VaeMemory.of(options))
        mode = memory.settle(stage.vram_mode)
        async with servicer.turn(mode):
            if fellowship is None:
                engines.append(await worker.run(lambda: VaeEngine.load(options, memory, mode)))
            else:
                engines.append(await worker.run(lambda: load_leader(options, memory, mode, fellowship)))
            await worker.run(engines[0].warm_up)

    async def close() -> None:
        idle = worker.close()
        resolver.close()
        tensors.stop(stage.listen.grace_s)
        # In the middle of a load or a run the others expect its collectives; they end when this process does.
        if fellowship is not None and idle:
            stop_followers(fellowship)

    beside = stage.announcer("vae")
    await serve(stage.listen, services, load=load, close=close, drain=watcher.stop, while_serving=beside)


def main() -> None:
    """Parse flags and run."""
    parser = stage_parser("vae", DEFAULT_PORT)
    parser.add_argument(
        "--chunk-latent-frames",
        type=_chunk_length,
        default=1,
        help="latent frames whose pictures are handed over together: fewer hand-overs, more memory (default: 1)",
    )
    parser.add_argument(
        "--kernels",
        choices=[kernels.value for kernels in Kernels],
        default="auto",
        help="of the video decoder; auto: fused where they can run (default: %(default)s)",
    )
    args = parser.parse_args()
    ranks = Ranks.from_environment(os.environ)
    stage = stage_options(args)
    stage = replace(stage, device=rank_device(stage.device, ranks))
    if Kernels(args.kernels) is Kernels.FUSED and stage.device.type != "cuda":
        parser.error(f"--kernels fused needs CUDA, the device is {stage.device}; leave it out")
    problem = mode_problem(stage.vram_mode, stage.device, ranks.world_size)
    problem = f"--vram-mode: {problem}" if problem else _group_problem(ranks, insecure=args.insecure)
    if problem:
        configure_logging("vae", level=args.log_level, rank=ranks.rank)
        get_logger(__name__).error("cannot start", reason=problem)
        if ranks.world_size > 1:
            end_torchrun()
        raise SystemExit(EXIT_BAD_CONFIG)
    options = VaeOptions(stage, args.chunk_latent_frames, Kernels(args.kernels), ranks)
    if ranks.world_size > 1:
        die_with_parent()
    if ranks.rank > 0:
        configure_logging("vae", level=args.log_level, rank=ranks.rank)
        with refusing_bad_checkpoints(ranks):
            run_follower(options, join_decoders(options))
    else:
        run_service("vae", args.log_level, options, run(options), ranks)


def _group_problem(ranks: Ranks, *, insecure: bool) -> str:
    try:
        require_protected_group(ranks, insecure=insecure)
    except ValueError as error:
        return str(error)
    return ""


def _chunk_length(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LATENT_FRAMES:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is 1 to {MAX_LATENT_FRAMES}")
    return int(text)


if __name__ == "__main__":
    main()
