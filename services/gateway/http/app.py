"""The HTTP application: every router, and what stands around all of them."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from services.gateway.http.backend import Backend
from services.gateway.http.clips import ClipAnswers
from services.gateway.http.errors import add_error_handlers
from services.gateway.http.options import HttpOptions
from services.gateway.http.probes import probes_router
from services.gateway.http.request_scope import RequestScope
from services.gateway.http.studio_api.rest import studio_router
from services.gateway.http.studio_api.service import StudioService
from services.gateway.http.videos_api.router import videos_router

_EXPOSED_HEADERS = (
    "accept-ranges",
    "content-disposition",
    "content-range",
    "openai-poll-after-ms",
    "retry-after",
    "x-request-id",
)
"""What scripts of other origins may read."""
_DESCRIPTION = """Clips with sound from a prompt. `/v1/jobs` is the native API, `/v1/videos` speaks as OpenAI's videos
API does, `/api` is for the studio. Every answer has an `x-request-id`, which is found in the log."""


def make_app(backend: Backend, options: HttpOptions) -> ASGIApp:
    """The HTTP application."""
    app = FastAPI(
        title="ovi-serve",
        description=_DESCRIPTION,
        redoc_url=None,
        max_body_size=options.max_body_bytes,
        separate_input_output_schemas=False,
    )
    add_error_handlers(app)
    clips, studio = ClipAnswers(backend), StudioService(backend)
    for router in (
        probes_router(backend),
        videos_router(backend, clips),
        studio_router(backend, studio, clips),
    ):
        app.include_router(router)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    # Whoever guards the way in stands here, around all families and inside of the request's id.
    return RequestScope(app)
