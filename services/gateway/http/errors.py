"""Errors as HTTP answers: one table of statuses, three shapes of bodies.

`/v1/videos` answers as OpenAI's API does, `/api` as the studio expects, everything else as OpenAI's with all violations
beside.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shared.errors import FieldViolation, InvalidRequest, NotFound, OviError
from shared.logging import get_logger

log = get_logger(__name__)

_STATUS_OF_REASON = {"DISK_FULL": 507}
_STATUS_OF_CODE = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_RETRY_AFTER_S = {429: 5, 503: 2}
"""Where the error itself does not say."""
_PASSING = (429, 503, 504)
"""A repeated call can succeed. An unexpected error is not among them: what it did before it broke is not known."""
_CLIENT_GONE = 499


class VideoNotReady(NotFound):
    """The job is there but has no clip to show."""

    reason = "VIDEO_NOT_READY"


@dataclass(frozen=True)
class Failure:
    """An error, ready to be put in any shape."""

    status: int
    code: str
    """Stable machine-readable word."""
    message: str
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None


def failure_of(error: Exception) -> Failure:
    """The failure of any exception; unknown ones are logged under a new id."""
    if isinstance(error, OviError):
        status = _STATUS_OF_REASON.get(error.reason) or _STATUS_OF_CODE.get(error.code, 500)
        violations = error.violations if isinstance(error, InvalidRequest) else ()
        retry_after_s = getattr(error, "retry_after_s", None) or _RETRY_AFTER_S.get(status)
        return Failure(status, error.reason.lower(), error.message, violations, retry_after_s)
    if isinstance(error, RequestValidationError):
        invalid = InvalidRequest([_violation(detail) for detail in error.errors()])
        return Failure(400, "invalid_request", invalid.message, invalid.violations)
    if isinstance(error, HTTPException):
        code = _CODES_OF_STATUS.get(error.status_code, "invalid_request")
        return Failure(error.status_code, code, str(error.detail), (), _RETRY_AFTER_S.get(error.status_code))
    error_id = secrets.token_hex(8)
    log.error("unexpected error", error_id=error_id, exc_info=error)
    return Failure(500, "internal", f"internal error {error_id}; the gateway's log has the details under this id")


def openai_answer(failure: Failure, *, with_violations: bool) -> JSONResponse:
    """As OpenAI's API says it: bad input is 400, whatever kind it is of, since clients take 409 for a passing lock."""
    status = failure.status
    if not with_violations and status == 409:
        status = 400
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param = failure.violations[0].field if failure.violations else None
    body: dict[str, Any] = {"message": failure.message, "type": kind, "param": param, "code": failure.code}
    if with_violations:
        body["violations"] = [{"field": v.field, "description": v.description} for v in failure.violations]
    return JSONResponse({"error": body}, status_code=status, headers=_headers(status, failure))


def studio_answer(failure: Failure) -> JSONResponse:
    """As the studio expects it: `detail`, a list where fields are wrong."""
    status = 422 if failure.status == 400 else failure.status
    detail: Any = failure.message
    if failure.violations:
        detail = [
            {"loc": ["body", *violation.field.split(".")], "msg": violation.description, "type": "value_error"}
            for violation in failure.violations
        ]
    return JSONResponse({"detail": detail}, status_code=status, headers=_headers(status, failure))


def answer(path: str, failure: Failure) -> JSONResponse:
    """The failure in the shape of the family that a path belongs to."""
    if path.startswith("/api/"):
        return studio_answer(failure)
    return openai_answer(failure, with_violations=not path.startswith("/v1/videos"))


def add_error_handlers(app: FastAPI) -> None:
    """Every exception becomes an answer by the table."""

    async def handle(request: Request, error: Exception) -> Response:
        failure = failure_of(error)
        log.info("request refused", path=request.url.path, status=failure.status, code=failure.code)
        return answer(request.url.path, failure)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    for kind in (OviError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(ClientDisconnect, gone)


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str] | Callable[[str], str]) -> Iterator[None]:
    """Around a call of the engine: its field names become those of the client's API.

    Raises:
        InvalidRequest: the one that came, renamed.
    """
    try:
        yield
    except InvalidRequest as error:
        rename = names if callable(names) else lambda field: names.get(field, field)
        raise InvalidRequest([FieldViolation(rename(v.field), v.description) for v in error.violations]) from None


def _headers(status: int, failure: Failure) -> dict[str, str]:
    headers = {}
    if failure.retry_after_s is not None and status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(failure.retry_after_s)))
    headers["x-should-retry"] = "true" if status in _PASSING else "false"
    return headers


def _violation(detail: Mapping[str, Any]) -> FieldViolation:
    """Of pydantic's description of a wrong field."""
    where = [str(part) for part in detail["loc"] if part not in ("body", "query", "path", "header")]
    got = detail.get("input")
    shown = f"; got {str(got)[:80]!r}" if isinstance(got, str | int | float | bool) else ""
    return FieldViolation(".".join(where) or "body", f"{detail['msg']}{shown}")
