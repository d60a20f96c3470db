"""For supervisors and monitoring: liveness, readiness, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from services.gateway.http.backend import Backend

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SERVING = "SERVING"


def probes_router(backend: Backend) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        """The gateway and every stage serve; 503 and which one does not, otherwise."""
        own = _SERVING if backend.phase.serving else "NOT_SERVING"
        services = {"gateway": own, **await backend.clients.health()}
        waiting = [name for name, state in services.items() if state != _SERVING]
        body: dict[str, Any] = {"status": "not_ready" if waiting else "ready", "services": services}
        if waiting:
            body["detail"] = f"not serving: {', '.join(waiting)}"
        return JSONResponse(body, status_code=503 if waiting else 200)

    @router.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        counts, mode = await asyncio.gather(backend.engine.count_by_state(), backend.engine.vram_mode())
        backend.metrics.devices.show(
            backend.system.devices, backend.system.answers, num_warnings=backend.watcher.num_warnings, mode=mode
        )
        backend.metrics.workers.show(backend.clients.views())
        body = backend.metrics.render({state.value: count for state, count in counts.items()})
        return Response(body, media_type=_METRICS_TYPE)

    return router
