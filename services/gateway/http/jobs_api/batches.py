"""`/v1/batches`: many jobs at once, from a list or from a table with pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AwareDatetime, BaseModel, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.batch import MAX_JOBS, MAX_SAMPLES, MAX_TABLE_BYTES
from services.gateway.engine import GatewayEngine
from services.gateway.http.backend import Backend
from services.gateway.http.bodies import json_object, request_id_of
from services.gateway.http.errors import in_words_of
from services.gateway.http.jobs_api.schemas import (
    NO_CONTROLS,
    Characters,
    ClipRequest,
    Priority,
    Prompt,
    engine_field,
)
from services.gateway.http.openapi import ERRORS, ref_to
from services.gateway.http.uploads import keep_picture
from services.gateway.jobs.domain import DEFAULT_PRIORITY, Submission
from shared.errors import InvalidRequest
from shared.pictures import MAX_PICTURE_BYTES

_MAX_IMAGES = 64
_IMAGE_COLUMN = "image_path"


class BatchItem(ClipRequest):
    """One job of a list."""

    prompt: Prompt


class BatchRequest(ClipRequest):
    """Jobs to be made, from a list or from a table; beside a table the other fields hold for each of its rows."""

    requests: list[BatchItem] = Field(default=[], max_length=MAX_JOBS)
    table: Characters = Field(
        "",
        max_length=MAX_TABLE_BYTES,
        description="CSV or TSV with the column text_prompt and, if wanted, image_path: a file's name or an image id.",
    )
    samples_per_prompt: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = Field(
        default=1, description="Seeds are counted up."
    )
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,100}$")] = ""
    priority: Priority | None = None
    deadline_time: AwareDatetime | None = None
    label: Annotated[Characters, Field(max_length=200, pattern=NO_CONTROLS)] = ""


class BatchView(BaseModel):
    """A batch that was queued."""

    batch_id: str
    job_ids: list[str] = Field(description="In the order of the rows, samples of one after another.")


_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ref_to(BatchRequest)},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "description": "`table` and, for its image_path, `images`; further fields as in JSON.",
                    "required": ["table"],
                    "properties": {"table": _FILE, "images": {"type": "array", "items": _FILE}},
                }
            },
        },
    }
}


def batches_router(backend: Backend) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1/batches", tags=["Jobs"], responses=ERRORS)
    engine = backend.engine

    @router.post("", status_code=201, openapi_extra=_BODY)
    async def create_batch(request: Request) -> BatchView:
        """Queue all jobs of a batch, or none of them."""
        backend.phase.require_serving()
        kind = request.headers.get("content-type", "").lower()
        if kind.startswith("multipart/form-data"):
            form = await request.form(max_files=_MAX_IMAGES + 1, max_fields=64, max_part_size=MAX_TABLE_BYTES)
            wanted, table = await _read_form(engine, form)
        else:
            wanted = _parsed(await json_object(request))
            table = wanted.table.encode()
        submission = Submission(
            request_id=wanted.request_id or request_id_of(request, longest=100),
            priority=DEFAULT_PRIORITY if wanted.priority is None else wanted.priority,
            deadline_time_s=wanted.deadline_time.timestamp() if wanted.deadline_time is not None else None,
            label=wanted.label,
        )
        with in_words_of(_engine_field):
            jobs = await engine.create_batch(submission, _to_proto(wanted, table))
        return BatchView(batch_id=jobs[0].submission.batch_id, job_ids=[job.id for job in jobs])

    return router


def _to_proto(wanted: BatchRequest, table: bytes) -> pb.BatchCreateRequest:
    batch = pb.BatchCreateRequest(
        request_id=wanted.request_id, samples_per_prompt=wanted.samples_per_prompt, table=table
    )
    batch.requests.extend(item.to_proto(item.prompt) for item in wanted.requests)
    if table or wanted.template_fields():
        batch.template.CopyFrom(wanted.to_proto(""))
    return batch


async def _read_form(engine: GatewayEngine, form: FormData) -> tuple[BatchRequest, bytes]:
    fields: dict[str, Any] = {}
    images: dict[str, str] = {}
    table = b""
    for name, value in form.multi_items():
        if name == "images" and isinstance(value, UploadFile):
            images[value.filename or ""] = (await keep_picture(engine, await _content(value), field="images")).id
        elif name == "table":
            table = await _content(value) if isinstance(value, UploadFile) else value.encode()
        elif name in fields or isinstance(value, UploadFile):
            raise InvalidRequest.of(name[:80], "is a file, or given twice; allowed is one value")
        else:
            fields[name] = value
    if not table:
        raise InvalidRequest.of("table", "is missing, a form needs a table; send a list of requests as JSON")
    return _parsed(fields), _with_ids(table, images) if images else table


async def _content(file: UploadFile) -> bytes:
    if file.size is not None and file.size > MAX_PICTURE_BYTES:
        raise InvalidRequest.of(file.filename or "file", f"has {file.size} bytes, allowed is {MAX_PICTURE_BYTES}")
    return await file.read()


def _parsed(fields: Mapping[str, Any]) -> BatchRequest:
    try:
        return BatchRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _with_ids(table: bytes, images: Mapping[str, str]) -> bytes:
    """The table with the ids of uploaded pictures in place of their file names; what cannot be read stays as it is."""
    try:
        text = table.decode("utf-8-sig")
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error):
        return table
    header = [name.strip() for name in rows[0]] if rows else []
    if _IMAGE_COLUMN not in header:
        return table
    column = header.index(_IMAGE_COLUMN)
    for row in rows[1:]:
        if column < len(row):
            row[column] = images.get(row[column].strip(), row[column])
    rewritten = io.StringIO(newline="")
    csv.writer(rewritten, delimiter=delimiter).writerows(rows)
    return rewritten.getvalue().encode()


def _engine_field(field: str) -> str:
    return engine_field(field.removeprefix("template.")).replace(".options.", ".")
