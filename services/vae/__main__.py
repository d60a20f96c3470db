"""`python -m services.vae --checkpoints DIR`: the VAE service."""

from __future__ import annotations

import argparse

from ovi.vae.v1 import vae_pb2, vae_pb2_grpc
from services.vae.config import VaeOptions
from services.vae.engine import VaeEngine
from services.vae.ops import Kernels
from services.vae.request import MAX_LATENT_FRAMES
from services.vae.scratch import remove_abandoned
from services.vae.servicer import VaeServicer
from shared.device_worker import DeviceWorker
from shared.grpc_server import GrpcService, serve
from shared.service_main import run_service, stage_options, stage_parser
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver

DEFAULT_PORT = 50053


async def run(options: VaeOptions) -> None:
    """Load the networks, serve until a signal."""
    remove_abandoned()
    stage = options.stage
    engines: list[VaeEngine] = []
    worker = DeviceWorker("vae", max_pending=stage.max_pending)
    store = TensorStore(lease_s=stage.lease_s, max_bytes=stage.tensor_store_bytes)
    tensors = TensorServer(store, host=stage.listen.host, port=stage.data_port, advertise_host=stage.advertise_host)
    resolver = TensorResolver.over_grpc(stage.producer_hosts)
    servicer = VaeServicer(lambda: engines[0], worker, resolver, tensors, options)
    service = GrpcService(
        vae_pb2.DESCRIPTOR.services_by_name["VaeService"].full_name,
        lambda server: vae_pb2_grpc.add_VaeServiceServicer_to_server(servicer, server),
    )

    async def load() -> None:
        engines.append(await worker.run(lambda: VaeEngine.load(options)))

    async def close() -> None:
        worker.close()
        resolver.close()
        tensors.stop(stage.listen.grace_s)

    await serve(stage.listen, [service], load=load, close=close)


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
    options = VaeOptions(stage_options(args), args.chunk_latent_frames, Kernels(args.kernels))
    run_service("vae", args.log_level, options, run(options))


def _chunk_length(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LATENT_FRAMES:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is 1 to {MAX_LATENT_FRAMES}")
    return int(text)


if __name__ == "__main__":
    main()
