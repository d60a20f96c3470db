"""The HTTP application: every router, and what stands around all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from importlib.metadata import version

import socketio
from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from services.gateway.auth.caller import LOCAL, acting_as
from services.gateway.auth.gate import Gate
from services.gateway.auth.http_gate import HttpGate
from services.gateway.http.backend import Backend
from services.gateway.http.body_limit import BodyLimit
from services.gateway.http.clips import ClipAnswers
from services.gateway.http.errors import add_error_handlers, answer, failure_of
from services.gateway.http.jobs_api.batches import BatchRequest, batches_router
from services.gateway.http.jobs_api.jobs import jobs_router
from services.gateway.http.jobs_api.stock import stock_router
from services.gateway.http.openapi import add_models
from services.gateway.http.options import HttpOptions
from services.gateway.http.probes import probes_router
from services.gateway.http.request_scope import RequestScope
from services.gateway.http.studio_api.rest import studio_router
from services.gateway.http.studio_api.service import StudioService
from services.gateway.http.studio_api.sockets import StudioSockets
from services.gateway.http.videos_api.router import videos_router
from services.gateway.http.webhooks.registry import make_webhooks
from services.gateway.jobs.domain import Job
from shared.errors import OviError
from shared.unending import unending

_EXPOSED_HEADERS = (
    "accept-ranges",
    "content-disposition",
    "content-range",
    "etag",
    "openai-poll-after-ms",
    "retry-after",
    "x-request-id",
)
"""What scripts of other origins may read."""
_DESCRIPTION = """Clips with sound from a prompt. `/v1/jobs` is the native API, `/v1/videos` speaks as OpenAI's videos
API does, `/api` is for the studio. Every answer has an `x-request-id`, which is found in the log."""


class HttpApp:
    """Every family of clients, as one ASGI application, and the work that goes on beside requests."""

    def __init__(self, backend: Backend, options: HttpOptions, gate: Gate) -> None:
        """
        Args:
            backend: the gateway.
            options: how to answer.
            gate: lets calls in.

        Raises:
            ValueError: the webhooks' secret cannot be used; names the flag.
        """
        self._backend = backend
        self._webhooks = make_webhooks(backend, options)
        clips, studio = ClipAnswers(backend), StudioService(backend)
        self._sockets = StudioSockets(
            studio, gate, cors_origins=options.cors_origins, max_message_bytes=options.max_body_bytes
        )
        routes = _routes(
            options,
            (
                probes_router(backend),
                jobs_router(backend, clips, self._webhooks),
                batches_router(backend),
                stock_router(backend),
                videos_router(backend, clips),
                studio_router(backend, studio, clips),
            ),
        )
        families = socketio.ASGIApp(self._sockets.server, BodyLimit(routes, options.max_body_bytes))
        # The gate stands around all families, and inside of the request's id.
        guarded = HttpGate(families, gate, _refusal)
        self.asgi: ASGIApp = RequestScope(guarded)
        self._telling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell clients of changes."""
        # Changes are collected before the look at what had ended until now: no end falls between the two.
        changes = self._backend.engine.watch_all()
        self._webhooks.start()
        self._telling = asyncio.create_task(unending("clients are told", partial(self._tell, changes)))

    async def stop(self) -> None:
        """Tell nobody any more."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait({self._telling})
        await self._webhooks.stop()

    async def _tell(self, changes: AsyncGenerator[Job, None]) -> None:
        with acting_as(LOCAL):
            async for job in changes:
                await self._sockets.tell(job)
                await self._webhooks.job_changed(job)


def _refusal(path: str, error: OviError) -> Response:
    return answer(path, failure_of(error))


def _routes(options: HttpOptions, routers: Sequence[APIRouter]) -> FastAPI:
    app = FastAPI(
        title="ovi-serve",
        version=version("ovi-serve"),
        description=_DESCRIPTION,
        redoc_url=None,
        max_body_size=options.max_body_bytes,
        separate_input_output_schemas=False,
    )
    add_error_handlers(app)
    for router in routers:
        app.include_router(router)
    add_models(app, BatchRequest)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    return app
