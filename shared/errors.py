"""The one table of errors: what can go wrong, and which gRPC status it becomes.

Engines raise these; only `shared.grpc_server` turns them into statuses and `shared.grpc_client` turns statuses back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

EXIT_BAD_CONFIG = 3
"""Exit status of a service that can never start as configured; restarting it does not help."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request: its path, and what came and what is allowed."""

    field: str
    description: str


class OviError(Exception):
    """Base of every expected failure. `code` is a gRPC status name, `reason` a stable machine-readable word."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    retry_after_s: float | None = None
    """After how many seconds the same call may succeed; None: repeating it does not help, or nobody knows."""

    @property
    def message(self) -> str:
        """What came, what was expected, what to do."""
        return str(self)


class InvalidRequest(OviError):
    """The input is wrong; carries every violation found, not only the first."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        if not violations:
            raise ValueError("InvalidRequest needs at least one violation")
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """An error of a single field."""
        return cls([FieldViolation(field, description)])


class NotFound(OviError):
    """The named thing does not exist."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExists(OviError):
    """The name is taken by something different."""

    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class FailedPrecondition(OviError):
    """The thing exists but is not in a state that allows this."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class ReferenceLost(FailedPrecondition):
    """A tensor reference's lease has ended or its producer is gone; the producing stage must run again."""

    reason = "TENSOR_REFERENCE_LOST"


class CheckpointError(FailedPrecondition):
    """A weight file is missing, damaged or does not fit the model; names the file and what to do."""

    reason = "CHECKPOINT"


class CorruptTensor(OviError):
    """Tensor bytes did not arrive as announced."""

    code = "DATA_LOSS"
    reason = "CORRUPT_TENSOR"


class ResourceExhausted(OviError):
    """A queue or a store is full; try later."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class QuotaExceeded(OviError):
    """Somebody has used all that is theirs for now; says whose, of what, and when there is more."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, subject: str = "", retry_after_s: float | None = None) -> None:
        """
        Args:
            message: what was used up, and when there is more.
            subject: whose quota it is, for example "key:team-a".
            retry_after_s: seconds until there is more.
        """
        super().__init__(message)
        self.subject = subject
        self.retry_after_s = retry_after_s


class OutOfMemory(OviError):
    """The device has not enough memory for this work; the same call would fail again."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class RateLimited(ResourceExhausted):
    """Too many calls; the same call succeeds after `retry_after_s`."""

    reason = "RATE_LIMITED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DiskFull(OviError):
    """A folder that must be written has no space left; the same call succeeds once there is some."""

    code = "RESOURCE_EXHAUSTED"
    reason = "DISK_FULL"


class Unavailable(OviError):
    """Loading, draining or unreachable; the same call can succeed later."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"
    retry_after_s = 2.0


class DeadlineExceeded(OviError):
    """The caller's time ran out."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(OviError):
    """The caller no longer wants the result."""

    code = "CANCELLED"
    reason = "CANCELLED"


class Internal(OviError):
    """Anything else; the message carries an id that is found in the service's log."""


class Unauthenticated(OviError):
    """No or wrong credentials."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(OviError):
    """Known credentials that do not allow this."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


ERRORS: tuple[type[OviError], ...] = (
    InvalidRequest,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    ReferenceLost,
    CheckpointError,
    CorruptTensor,
    ResourceExhausted,
    QuotaExceeded,
    OutOfMemory,
    RateLimited,
    DiskFull,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    Internal,
    Unauthenticated,
    PermissionDenied,
)
