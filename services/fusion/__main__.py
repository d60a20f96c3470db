"""The fusion service: `python -m services.fusion --checkpoints DIR`, or the same through torchrun with a rank a GPU."""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace

from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from services.fusion.config import FusionOptions
from services.fusion.engine import FusionEngine
from services.fusion.group import LeadingEngine, follow, share_plan
from services.fusion.model.config import RELEASED
from services.fusion.ops import Execution, Kernels
from services.fusion.parallel.plan import ParallelPlan, choose_plan
from services.fusion.planner import standard_bytes
from services.fusion.servicer import FusionServicer
from shared.allocations import ALLOCATIONS
from shared.death_signal import die_with_parent
from shared.device_memory import free_to_take
from shared.device_worker import DeviceWorker
from shared.errors import EXIT_BAD_CONFIG
from shared.group.ranks import (
    Ranks,
    end_torchrun,
    join_group,
    rank_device,
    require_protected_group,
)
from shared.grpc_server import GrpcService, serve
from shared.logging import configure_logging, get_logger
from shared.memory.devices import Devices
from shared.memory.modes import WeightFormat
from shared.memory.watcher import DeviceWatcher, own_devices
from shared.service_main import StageOptions, refusing_bad_checkpoints, run_service, stage_options, stage_parser
from shared.system_service import system_service
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from shared.variants import VARIANTS

DEFAULT_PORT = 50052


async def run(options: FusionOptions) -> None:
    """Load the first model, serve until a signal: the only rank, or rank 0 of several."""
    stage = options.stage
    engine = _make_engine(options)
    worker = DeviceWorker("fusion", max_pending=stage.max_pending, device=stage.device)
    store = TensorStore(lease_s=stage.lease_s, max_bytes=stage.tensor_store_bytes)
    tensors = stage.tensor_server(store)
    resolver = TensorResolver.over_grpc(stage.producer_hosts, stage.listen.tls)
    servicer = FusionServicer(engine, worker, resolver, tensors, options)
    watcher = DeviceWatcher(own_devices(Devices()))
    services = [
        GrpcService(
            fusion_pb2.DESCRIPTOR.services_by_name["FusionService"].full_name,
            lambda server: fusion_pb2_grpc.add_FusionServiceServicer_to_server(servicer, server),
        ),
        system_service(watcher, servicer.plan, servicer.set_mode, servicer.describe, device=str(stage.device)),
    ]

    async def load() -> None:
        await watcher.start()
        await asyncio.to_thread(engine.discover)
        model = engine.variant(options.model).variant.id if options.model else next(iter(engine.served))
        async with servicer.turn():
            await worker.run(lambda: engine.load(model))
            await worker.run(lambda: engine.warm_up(model))

    async def close() -> None:
        idle = worker.close()
        resolver.close()
        # A run that ended while draining is lost, and made again, if nobody can fetch its latents any more.
        await asyncio.to_thread(store.wait_empty, stage.listen.grace_s)
        tensors.stop(stage.listen.grace_s)
        # In the middle of a load or a run the others expect its collectives; they end when this process does.
        if isinstance(engine, LeadingEngine) and idle:
            engine.stop_followers()

    beside = stage.announcer("fusion")
    await serve(stage.listen, services, load=load, close=close, drain=watcher.stop, while_serving=beside)


def _make_engine(options: FusionOptions) -> FusionEngine:
    stage = options.stage
    given = (stage.checkpoints, stage.device, stage.precision, options.execution)
    if options.ranks.world_size == 1:
        return FusionEngine(*given, vram_mode=stage.vram_mode, memory_bytes=stage.memory_bytes)
    fellowship = join_group(options.ranks, stage.device)
    groups = share_plan(options.plan, fellowship.channel)
    return LeadingEngine(*given, groups, fellowship, stage.vram_mode, stage.memory_bytes)


def run_follower(options: FusionOptions) -> None:
    """Every rank but 0: follow rank 0 until it says stop."""
    stage = options.stage
    fellowship = join_group(options.ranks, stage.device)
    groups = share_plan(options.plan, fellowship.channel)
    given = (stage.checkpoints, stage.device, stage.precision, options.execution, groups)
    engine = FusionEngine(*given, vram_mode=stage.vram_mode, memory_bytes=stage.memory_bytes)
    engine.discover()
    follow(engine, fellowship)


def _choose_plan(name: str, stage: StageOptions, weights: WeightFormat, ranks: Ranks) -> ParallelPlan:
    lossless = weights is WeightFormat.NATIVE
    room = free_to_take(stage.device) if stage.memory_bytes is None else stage.memory_bytes

    def fits(plan: ParallelPlan) -> bool:
        return room is None or not lossless or standard_bytes(stage.checkpoints, stage.precision, plan) <= room

    plan = choose_plan(name, ranks.world_size, RELEASED.num_heads, ranks.num_hosts, fits)
    if plan.weights_degree > 1 and not lossless:
        raise ValueError(f"the plan {name} shares weights as they are stored; it needs --weights native")
    if ranks.rank == 0:  # whose plan counts
        get_logger(__name__).info("plan", name=name, plan=plan.describe(), device_bytes=room)
    return plan


def main() -> None:
    """Parse flags and run."""
    parser = stage_parser("fusion", DEFAULT_PORT)
    parser.add_argument("--model", choices=sorted(VARIANTS), help="variant to load at start (default: the first found)")
    parser.add_argument(
        "--kernels",
        choices=[kernels.value for kernels in Kernels],
        default="auto",
        help="auto: fused where they can run (default: %(default)s)",
    )
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="record steps as CUDA graphs (default: where several ranks share a pass)",
    )
    parser.add_argument(
        "--weights",
        choices=[weights.value for weights in WeightFormat],
        default="native",
        help="of the wide layers; fp8 and int8 are lossy and half as large, fp8 is faster on Ada and Hopper"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--plan",
        choices=ALLOCATIONS,
        default="auto",
        help="how the ranks share the work: auto chooses by their number, and shares the weights as fsdp does"
        " where one GPU cannot hold them (default: %(default)s)",
    )
    args = parser.parse_args()
    ranks = Ranks.from_environment(os.environ)
    configure_logging("fusion", level=args.log_level, rank=ranks.rank)
    stage = stage_options(args)
    stage = replace(stage, device=rank_device(stage.device, ranks))
    execution = Execution(Kernels(args.kernels), args.graphs, WeightFormat(args.weights))
    try:
        require_protected_group(ranks, insecure=args.insecure)
        plan = _choose_plan(args.plan, stage, execution.weights, ranks)
        options = FusionOptions(stage, args.model, execution, ranks, plan)
    except ValueError as error:
        get_logger(__name__).error("cannot start", reason=str(error))
        if ranks.world_size > 1:
            end_torchrun()
        raise SystemExit(EXIT_BAD_CONFIG) from None
    if ranks.world_size > 1:
        die_with_parent()
    if ranks.rank > 0:
        with refusing_bad_checkpoints(ranks):
            run_follower(options)
    else:
        run_service("fusion", args.log_level, options, run(options), ranks)


if __name__ == "__main__":
    main()
