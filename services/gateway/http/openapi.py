"""Parts of the OpenAPI document that several routers share."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

MP4 = {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}
WEBP = {"image/webp": {"schema": {"type": "string", "format": "binary"}}}
JPEG = {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}


class Violation(BaseModel):
    """One wrong field."""

    field: str
    description: str


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The first wrong field."""
    code: str
    """Stable word for programs."""
    violations: list[Violation] = []
    """Every wrong field."""


class ErrorBody(BaseModel):
    """Body of every refusal."""

    error: ErrorDetails


class StudioErrorBody(BaseModel):
    """Body of every refusal to the studio."""

    detail: Any


ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "Refused, and why."}}
STUDIO_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": StudioErrorBody, "description": "Refused, and why."}
}


def body_of(schema: dict[str, Any], *media_types: str) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in media_types}}}


def ref_to(model: type[BaseModel]) -> dict[str, str]:
    """The schema of a model that is in the document."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def add_models(app: FastAPI, *models: type[BaseModel]) -> None:
    """Put models into the document that no route declares, since their routes read bodies themselves."""
    document = app.openapi()
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= schema.pop("$defs", {}) | {model.__name__: schema}
