"""`python -m services.gateway --data-dir DIR`: the gateway."""

from __future__ import annotations

import argparse
import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa

from ovi.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.artifacts import Artifacts
from services.gateway.auth.audit import Audit
from services.gateway.auth.gate import Gate
from services.gateway.auth.grpc_gate import GateInterceptor
from services.gateway.auth.key_store import KeyStore
from services.gateway.auth.limits import KeyLimitsBook
from services.gateway.auth.options import AuthOptions, add_security_flags, security_options
from services.gateway.config import GatewayOptions, PipelineOptions, Retention, StageAddresses, StagePlaces
from services.gateway.database import CannotStart, DataDirLock, database_url
from services.gateway.engine import GatewayEngine
from services.gateway.fitting import Fitting
from services.gateway.http.app import HttpApp
from services.gateway.http.backend import Backend, GatewayPhase
from services.gateway.http.connections import ConnectionLimits
from services.gateway.http.options import add_http_flags, http_options
from services.gateway.http.server import HttpSide
from services.gateway.images import ImageStore
from services.gateway.job_side import JobSide
from services.gateway.jobs.estimates import Estimator
from services.gateway.metrics import GatewayMetrics
from services.gateway.models import ModelCatalog
from services.gateway.objects import checked_url, open_store, until_usable
from services.gateway.servicer import JobServicer, ModelServicer, StackSystemServicer, WorkerServicer
from services.gateway.stages import StageClients
from services.gateway.system import StackSystem
from services.gateway.work import JobWork
from services.gateway.workers.directory import Directory
from services.gateway.workers.registry import Registry
from shared.errors import EXIT_BAD_CONFIG
from shared.grpc_server import GrpcService, ListenConfig, serve
from shared.logging import get_logger
from shared.memory.watcher import DeviceWatcher
from shared.service_main import run_service
from shared.system_service import system_grpc_service
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import LOOPBACK_HOSTS, TensorResolver

_LATENT_LEASE_S = 3600.0
_LATENT_STORE_BYTES = 1 << 30
_THREADS = 64
"""For files and tensors; those of the database are its own."""


async def run(options: GatewayOptions) -> None:
    """Own the data folder, take up unfinished jobs, serve until a signal.

    Raises:
        CannotStart: the data folder is another gateway's, or cannot be used.
    """
    if options.database is not None:
        await _run_owner(options)
        return
    with DataDirLock(options.data_dir):
        await _run_owner(options)


async def _run_owner(options: GatewayOptions) -> None:
    listen = options.listen
    metrics, phase = GatewayMetrics(), GatewayPhase()
    limits = KeyLimitsBook()
    job_side = JobSide(options.data_dir, options.database, limits, metrics, options.pipeline)
    gate = _make_gate(options.security.auth, job_side.database, limits)
    tracker = job_side.tracker
    clients = StageClients.connecting(options.security.stage_tls)
    catalog = ModelCatalog(clients.models)
    system = StackSystem(clients)
    watcher = DeviceWatcher(system.look)
    store = open_store(options.artifacts_url, options.data_dir)
    artifacts, images = Artifacts(store), ImageStore(store)
    resolver = TensorResolver.over_grpc(options.producer_hosts, options.security.stage_tls)
    places = options.stages.by_stage
    open_to = [stage for stage, place in places.items() if place.registered]
    registry = Registry(clients.by_stage, open_to, resolver.accepts)
    directory = Directory(clients.by_stage, {stage: place.given for stage, place in places.items()}, registry)
    latents = TensorStore(lease_s=_LATENT_LEASE_S, max_bytes=_LATENT_STORE_BYTES)
    tensors = TensorServer(
        latents,
        host=options.data_host,
        port=options.data_port,
        advertise_host=options.advertise_host,
        tls=options.security.stage_tls,
    )
    work = JobWork(tracker, clients, catalog, artifacts, images, resolver, tensors, metrics, options.pipeline)
    pipeline = job_side.build(work, artifacts)
    estimator = Estimator(job_side.queue, tracker, lanes=lambda: clients.fusion.num_up)
    fitting = Fitting(clients.fusion_plan)
    engine = GatewayEngine(
        tracker,
        job_side.queue,
        pipeline,
        estimator,
        catalog,
        fitting,
        artifacts,
        images,
        metrics,
        log_prompts=options.security.auth.log_prompts,
    )
    kept_s = options.pipeline.retention.max_age_s
    backend = Backend(engine, job_side.database, clients, artifacts, metrics, phase, system, watcher, kept_s)
    try:
        http_app = HttpApp(backend, options.http, gate)
    except ValueError as error:
        raise CannotStart(str(error)) from None
    try:
        http = HttpSide(
            http_app.asgi,
            host=listen.host,
            port=options.http_port,
            grace_s=listen.grace_s,
            max_message_bytes=options.http.max_body_bytes,
            limits=ConnectionLimits(options.http.max_connections),
            tls=listen.tls,
        )
    except OSError as error:
        raise CannotStart(
            f"--http-port {options.http_port} on {listen.host}: {error.strerror}; choose another"
        ) from None

    async def load() -> None:
        # Calls of a store that hangs hold their threads for half a minute, and jobs need some meanwhile.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "work"))
        await until_usable(store)
        await job_side.start()
        await gate.start()
        await directory.start()
        http.start()
        await watcher.start()
        http_app.start()
        phase.serving = True

    async def drain() -> None:
        phase.serving = False
        tracker.end_watches()
        await watcher.stop()

    async def close() -> None:
        await http_app.stop()
        await http.stop()
        await gate.close()
        await job_side.close()
        await directory.stop()
        await clients.close()
        resolver.close()
        tensors.stop(listen.grace_s)

    services = [*_services(engine, registry), system_grpc_service(StackSystemServicer(watcher, system, clients))]
    await serve(listen, services, load=load, close=close, drain=drain, interceptors=[GateInterceptor(gate)])


def _make_gate(options: AuthOptions, database: sa.Engine, limits: KeyLimitsBook) -> Gate:
    try:
        return Gate(KeyStore(database), options, Audit(options.audit_log), limits)
    except OSError as error:
        what = f"--audit-log {options.audit_log} cannot be written ({error.strerror}); choose another file"
        raise CannotStart(what) from None


def _services(engine: GatewayEngine, registry: Registry) -> list[GrpcService]:
    names = gateway_pb2.DESCRIPTOR.services_by_name
    jobs, models, workers = JobServicer(engine), ModelServicer(engine), WorkerServicer(registry)
    return [
        GrpcService(
            names["JobService"].full_name,
            lambda server: gateway_pb2_grpc.add_JobServiceServicer_to_server(jobs, server),
        ),
        GrpcService(
            names["ModelService"].full_name,
            lambda server: gateway_pb2_grpc.add_ModelServiceServicer_to_server(models, server),
        ),
        GrpcService(
            names["WorkerService"].full_name,
            lambda server: gateway_pb2_grpc.add_WorkerServiceServicer_to_server(workers, server),
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.gateway")
    add = parser.add_argument
    add(
        "--data-dir",
        type=Path,
        required=True,
        help="folder of the database, and of clips and pictures if nothing else is said",
    )
    add(
        "--database-url",
        default=os.environ.get("OVI_DATABASE_URL", ""),
        help="postgresql+psycopg://USER:PASSWORD@HOST/NAME, which several gateways can share"
        " (default: OVI_DATABASE_URL, else a SQLite file in the data folder)",
    )
    add(
        "--artifacts-url",
        default=os.environ.get("OVI_ARTIFACTS_URL", ""),
        help="where clips, latents, checkpoints and pictures lie: file:///FOLDER, s3://BUCKET/PREFIX or"
        " gs://BUCKET/PREFIX (default: OVI_ARTIFACTS_URL, else the data folder)",
    )
    add("--host", default="127.0.0.1", help="interface to listen on (default: loopback only)")
    add("--grpc-port", "--port", type=int, default=50050, help="port of the gRPC API (default: %(default)s)")
    add("--http-port", type=int, default=8000, help="port of the HTTP side; 0 picks a free one (default: %(default)s)")
    add("--data-port", type=int, default=0, help="tensor port; 0 picks a free one (default: %(default)s)")
    add("--data-host", default="127.0.0.1", help="interface of the tensor port (default: loopback only)")
    add("--advertise-host", default=None, help="name the stages use for this host (default: --data-host)")
    add(
        "--producer-hosts",
        default="",
        help="hosts whose tensors are accepted, and that may register, besides loopback; *.name: all below it",
    )
    add("--text-encoder", default="127.0.0.1:50051", help="the text encoders, as --fusion (default: %(default)s)")
    add(
        "--fusion",
        default="127.0.0.1:50052",
        help="fusion services, comma-separated: host:port; dns:///name:port, a name with an address for each;"
        " registered, for those that register themselves (default: %(default)s)",
    )
    add("--vae", default="127.0.0.1:50053", help="the VAE services, as --fusion (default: %(default)s)")
    add(
        "--max-concurrent-jobs",
        type=int,
        default=0,
        help="jobs worked on at once; 0: as many as there are fusion workers for this gateway, and two",
    )
    add("--worker-wait-s", type=float, default=600.0, help="seconds a job waits for a stage (default: %(default)s)")
    add(
        "--checkpoint-steps",
        type=int,
        default=10,
        help="most steps of a denoise that are made again if its worker or gateway is killed; 0: all of them,"
        " and no checkpoint is kept (default: %(default)s)",
    )
    add(
        "--give-way",
        action="store_true",
        help="set a job at its denoise aside for one of higher priority; it goes on later from where it was",
    )
    add("--stage-timeout-s", type=float, default=6 * 3600.0, help="most seconds of a stage (default: %(default)s)")
    add("--lease-s", type=float, default=20.0, help="with several gateways: seconds until one is given up")
    keeps = "0 sets no limit (default: %(default)s)"
    add("--retention-days", type=float, default=0.0, help=f"days that ended jobs and their clips are kept; {keeps}")
    add("--retention-jobs", type=int, default=0, help=f"ended jobs that are kept, the last ones; {keeps}")
    add("--retention-gib", type=float, default=0.0, help=f"GiB of files of ended jobs that are kept; {keeps}")
    add_http_flags(parser)
    add_security_flags(parser)
    add("--grace-s", type=float, default=20.0, help="seconds to drain after SIGTERM (default: %(default)s)")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def main() -> None:
    """Parse flags and run."""
    parser = _parser()
    args = parser.parse_args()
    try:
        pipeline = PipelineOptions(
            max_concurrent_jobs=args.max_concurrent_jobs,
            worker_wait_s=args.worker_wait_s,
            stage_timeout_s=args.stage_timeout_s,
            lease_s=args.lease_s,
            checkpoint_steps=args.checkpoint_steps,
            give_way=args.give_way,
            retention=Retention(args.retention_days * 86_400, args.retention_jobs, int(args.retention_gib * 2**30)),
        )
        database = database_url(args.database_url)
        artifacts_url = checked_url(args.artifacts_url)
        stages = StageAddresses(
            StagePlaces.parse("--text-encoder", args.text_encoder),
            StagePlaces.parse("--fusion", args.fusion),
            StagePlaces.parse("--vae", args.vae),
        )
        http = http_options(args)
        security = security_options(args)
    except ValueError as error:
        parser.error(str(error))
    options = GatewayOptions(
        listen=ListenConfig(args.host, args.grpc_port, args.grace_s, security.tls),
        http_port=args.http_port,
        http=http,
        data_host=args.data_host,
        data_port=args.data_port,
        advertise_host=args.advertise_host or args.data_host,
        producer_hosts=LOOPBACK_HOSTS | set(_listed(args.producer_hosts)),
        data_dir=args.data_dir.absolute(),
        artifacts_url=artifacts_url,
        database=database,
        stages=stages,
        security=security,
        pipeline=pipeline,
    )
    try:
        run_service("gateway", args.log_level, options, run(options))
    except CannotStart as error:
        get_logger(__name__).error("cannot start", reason=error.message)
        raise SystemExit(EXIT_BAD_CONFIG) from None


if __name__ == "__main__":
    main()
