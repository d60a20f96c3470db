"""What jobs are made of and wait for: models, pictures, the queue."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from services.gateway.http.backend import Backend
from services.gateway.http.jobs_api.schemas import ImageView, ModelList, QueueView, model_view
from services.gateway.http.openapi import ERRORS
from services.gateway.http.uploads import keep_picture
from shared.errors import InvalidRequest
from shared.pictures import MAX_PICTURE_BYTES

_FILE = {"type": "string", "format": "binary"}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file"], "properties": {"file": _FILE}},
            },
            "image/png": {"schema": _FILE},
            "image/jpeg": {"schema": _FILE},
            "image/webp": {"schema": _FILE},
        },
    }
}


def stock_router(backend: Backend) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.get("/models", tags=["Models"])
    async def list_models() -> ModelList:
        """The variants that can be made; the first is the default."""
        return ModelList(data=[model_view(model) for model in await backend.engine.models()])

    @router.get("/queue", tags=["Jobs"])
    async def queue() -> QueueView:
        """How many jobs there are, and how long a new one would wait."""
        counts, stats = await asyncio.gather(backend.engine.count_by_state(), backend.engine.stats())
        return QueueView(num_jobs=counts, wait_s=stats.wait_s)

    @router.post("/images", status_code=201, tags=["Images"], openapi_extra=_UPLOAD)
    async def upload_image(request: Request) -> ImageView:
        """Keep a first picture (PNG, JPEG or WebP), as a form's `file` or as the body itself."""
        backend.phase.require_serving()
        kept = await keep_picture(backend.engine, await _picture(request), field="file")
        return ImageView(image_id=kept.id, height=kept.height, width=kept.width)

    return router


async def _picture(request: Request) -> bytes:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await request.body()
    form = await request.form(max_files=1, max_fields=4)
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidRequest.of("file", "is missing; send the picture as a part with a file name")
    if file.size is not None and file.size > MAX_PICTURE_BYTES:
        raise InvalidRequest.of("file", f"got {file.size} bytes, allowed is at most {MAX_PICTURE_BYTES}")
    return await file.read()
