"""`python -m services.text_encoder --checkpoints DIR`: the text encoder service."""

from __future__ import annotations

from ovi.text_encoder.v1 import text_encoder_pb2, text_encoder_pb2_grpc
from services.text_encoder.config import TextEncoderOptions
from services.text_encoder.memory import mode_problem
from services.text_encoder.servicer import TextEncoderServicer
from shared.device_worker import DeviceWorker
from shared.grpc_server import GrpcService, serve
from shared.memory.devices import Devices
from shared.memory.watcher import DeviceWatcher, own_devices
from shared.service_main import run_service, stage_options, stage_parser
from shared.system_service import system_service
from shared.tensors.store import TensorStore

DEFAULT_PORT = 50051


async def run(options: TextEncoderOptions) -> None:
    """Load the encoder, serve until a signal."""
    stage = options.stage
    worker = DeviceWorker("text encoder", max_pending=stage.max_pending, device=stage.device)
    store = TensorStore(lease_s=stage.lease_s, max_bytes=stage.tensor_store_bytes)
    tensors = stage.tensor_server(store)
    servicer = TextEncoderServicer(options, worker, tensors)
    watcher = DeviceWatcher(own_devices(Devices()))
    services = [
        GrpcService(
            text_encoder_pb2.DESCRIPTOR.services_by_name["TextEncoderService"].full_name,
            lambda server: text_encoder_pb2_grpc.add_TextEncoderServiceServicer_to_server(servicer, server),
        ),
        system_service(watcher, servicer.plan, servicer.set_mode, servicer.describe, device=str(stage.device)),
    ]

    async def load() -> None:
        await watcher.start()
        await servicer.load()

    async def close() -> None:
        worker.close()
        tensors.stop(stage.listen.grace_s)

    beside = stage.announcer("text_encoder")
    await serve(stage.listen, services, load=load, close=close, drain=watcher.stop, while_serving=beside)


def main() -> None:
    """Parse flags and run."""
    parser = stage_parser("text_encoder", DEFAULT_PORT)
    parser.add_argument(
        "--cache-mib",
        type=float,
        default=512.0,
        help="most MiB of embeddings kept; 0 keeps none (default: %(default)s)",
    )
    args = parser.parse_args()
    if not 0 <= args.cache_mib < 2**40:
        parser.error(f"--cache-mib {args.cache_mib:g}: must be 0 (no cache) or more")
    stage = stage_options(args)
    if problem := mode_problem(stage.vram_mode, stage.device):
        parser.error(f"--vram-mode: {problem}")
    options = TextEncoderOptions(stage=stage, cache_bytes=int(args.cache_mib * 2**20))
    run_service("text_encoder", args.log_level, options, run(options))


if __name__ == "__main__":
    main()
