"""The HTTP side: probes, metrics and finished clips. Runs on the gateway's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, JSONResponse, Response

from services.gateway.artifacts import Artifacts, is_job_id
from services.gateway.engine import GatewayEngine
from services.gateway.jobs.domain import JobState
from services.gateway.metrics import GatewayMetrics
from services.gateway.stages import StageClients
from services.gateway.system import StackSystem
from shared.errors import OviError
from shared.logging import get_logger
from shared.memory.watcher import DeviceWatcher

log = get_logger(__name__)

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SERVING = "SERVING"


class GatewayPhase:
    """Whether the gateway itself takes work; the HTTP side answers from the start of the process."""

    def __init__(self) -> None:
        self.serving = False


def make_app(
    engine: GatewayEngine,
    clients: StageClients,
    artifacts: Artifacts,
    metrics: GatewayMetrics,
    phase: GatewayPhase,
    system: StackSystem,
    watcher: DeviceWatcher,
) -> FastAPI:
    """The HTTP application."""
    app = FastAPI(title="ovi-serve", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """The gateway and every stage serve; 503 and which one does not, otherwise."""
        services = {"gateway": _SERVING if phase.serving else "NOT_SERVING", **await clients.health()}
        waiting = [name for name, state in services.items() if state != _SERVING]
        body: dict[str, Any] = {"status": "not_ready" if waiting else "ready", "services": services}
        if waiting:
            body["detail"] = f"not serving: {', '.join(waiting)}"
        return JSONResponse(body, status_code=503 if waiting else 200)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        counts, mode = await asyncio.gather(engine.count_by_state(), engine.vram_mode())
        metrics.devices.show(system.devices, system.answers, num_warnings=watcher.num_warnings, mode=mode)
        body = metrics.render({state.value: count for state, count in counts.items()})
        return Response(body, media_type=_METRICS_TYPE)

    @app.get("/api/health")
    async def api_health() -> dict[str, Any]:
        """In the studio's words."""
        health, counts = await asyncio.gather(clients.health(), engine.count_by_state())
        loaded = all(state == _SERVING for state in health.values())
        return {
            "status": "healthy" if loaded and phase.serving else "starting",
            "engine_loaded": loaded,
            "queue_size": counts[JobState.QUEUED],
            "total_jobs": sum(counts.values()),
        }

    _add_videos(app, engine, artifacts)
    return app


def _add_videos(app: FastAPI, engine: GatewayEngine, artifacts: Artifacts) -> None:
    @app.api_route("/api/videos/{name}", methods=["GET", "HEAD"])
    async def video(name: str) -> FileResponse:
        """A finished clip; parts of it by Range."""
        job_id = name.removesuffix(".mp4")
        if not name.endswith(".mp4") or not is_job_id(job_id):
            raise HTTPException(404, f"{name[:64]!r} is no video; the name is a job id and .mp4")
        try:
            job = await engine.get(job_id)
        except OviError as error:
            raise HTTPException(404, error.message) from None
        path = artifacts.video_path(job_id)
        if job.state is not JobState.COMPLETED or not path.is_file():
            raise HTTPException(404, f"{job_id} has no video: it is {job.state.value}")
        return FileResponse(path, media_type="video/mp4", filename=name, content_disposition_type="inline")


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: the gRPC side decides when the process ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpSide:
    """The application on a port."""

    def __init__(self, app: FastAPI, *, host: str, port: int, grace_s: float) -> None:
        """
        Args:
            app: what to serve.
            host: interface.
            port: TCP port; 0 picks a free one.
            grace_s: seconds that answers under way have to end.

        Raises:
            OSError: the port is taken.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        log.info("http listening", address=f"{host}:{self._socket.getsockname()[1]}")
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=max(1, int(grace_s))
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Answer what has been asked, then stop."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()
