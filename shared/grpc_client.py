"""The caller's side of the error table: statuses become `shared.errors` again."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from shared.errors import ERRORS, FieldViolation, Internal, InvalidRequest, OviError, QuotaExceeded

REQUEST_ID_KEY = "x-request-id"
"""Metadata key that carries a request id from service to service and into every log line."""

_BY_REASON = {error.reason: error for error in ERRORS}
_BY_CODE = {error.code: error for error in reversed(ERRORS)}


def error_of(error: grpc.RpcError) -> OviError:
    """The error a failed call stands for; details (reason, field violations) are kept where the peer sent them."""
    code = error.code().name
    message = error.details() or code
    violations: list[FieldViolation] = []
    kind = _BY_CODE.get(code, Internal)
    retry_after_s: float | None = None
    subject = ""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        quota = error_details_pb2.QuotaFailure()
        if detail.Unpack(info):
            kind = _BY_REASON.get(info.reason, kind)
        elif detail.Unpack(bad):
            violations.extend(FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        elif detail.Unpack(quota) and quota.violations:
            subject = quota.violations[0].subject
    if issubclass(kind, InvalidRequest):
        return InvalidRequest(violations or [FieldViolation("request", message)])
    known = kind(message, subject) if issubclass(kind, QuotaExceeded) else kind(message)
    known.retry_after_s = retry_after_s
    return known
