"""`python -m services.fusion --checkpoints DIR`: the fusion service."""

from __future__ import annotations

import asyncio

from ovi.fusion.v1 import fusion_pb2, fusion_pb2_grpc
from services.fusion.config import FusionOptions
from services.fusion.engine import FusionEngine
from services.fusion.ops import Kernels
from services.fusion.servicer import FusionServicer
from shared.device_worker import DeviceWorker
from shared.grpc_server import GrpcService, serve
from shared.service_main import run_service, stage_options, stage_parser
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from shared.variants import VARIANTS

DEFAULT_PORT = 50052


async def run(options: FusionOptions) -> None:
    """Load the first model, serve until a signal."""
    stage = options.stage
    engine = FusionEngine(stage.checkpoints, stage.device, stage.precision, options.kernels)
    worker = DeviceWorker("fusion", max_pending=stage.max_pending)
    store = TensorStore(lease_s=stage.lease_s, max_bytes=stage.tensor_store_bytes)
    tensors = TensorServer(store, host=stage.listen.host, port=stage.data_port, advertise_host=stage.advertise_host)
    resolver = TensorResolver.over_grpc(stage.producer_hosts)
    servicer = FusionServicer(engine, worker, resolver, tensors, stage)
    service = GrpcService(
        fusion_pb2.DESCRIPTOR.services_by_name["FusionService"].full_name,
        lambda server: fusion_pb2_grpc.add_FusionServiceServicer_to_server(servicer, server),
    )

    async def load() -> None:
        await asyncio.to_thread(engine.discover)
        model = engine.variant(options.model).variant.id if options.model else next(iter(engine.served))
        await worker.run(lambda: engine.load(model))

    async def close() -> None:
        worker.close()
        resolver.close()
        # A run that ended while draining is lost, and made again, if nobody can fetch its latents any more.
        await asyncio.to_thread(store.wait_empty, stage.listen.grace_s)
        tensors.stop(stage.listen.grace_s)

    await serve(stage.listen, [service], load=load, close=close)


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
    args = parser.parse_args()
    options = FusionOptions(stage=stage_options(args), model=args.model, kernels=Kernels(args.kernels))
    run_service("fusion", args.log_level, options, run(options))


if __name__ == "__main__":
    main()
