"""Who makes the present call, and what they may do. Knows no wire and no database."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from shared.errors import NotFound, PermissionDenied


class Role(enum.Enum):
    """What a key is for; values are those of the table."""

    VIEWER = "viewer"
    """Reads everything, changes nothing."""
    USER = "user"
    """Makes jobs, and sees and manages its own alone."""
    WORKER = "worker"
    """Registers workers of the stages, and nothing else."""
    ADMIN = "admin"
    """Everything."""


class Action(enum.Enum):
    """What a call does, as far as roles tell calls apart."""

    READ = "read"
    """Jobs that the caller sees, models, devices, plans, metrics."""
    MAKE = "make"
    """Jobs of the caller: creating, cancelling, deleting; pictures for them."""
    REGISTER = "register"
    """Workers of the stages."""
    ADMINISTER = "administer"
    """The stack and everybody's jobs."""


_ALLOWED = {
    Role.VIEWER: frozenset({Action.READ}),
    Role.USER: frozenset({Action.READ, Action.MAKE}),
    Role.WORKER: frozenset({Action.REGISTER}),
    Role.ADMIN: frozenset(Action),
}


@dataclass(frozen=True)
class KeyLimits:
    """Limits of one key; None: none."""

    max_concurrent_jobs: int | None = None
    """Jobs of this key worked on at once; the others wait."""
    max_daily_jobs: int | None = None
    """Jobs made in a day, counted in UTC; further ones are refused."""
    requests_per_minute: int | None = None
    """Calls a minute, each replica counting its own; None: the gateway's --requests-per-minute."""

    def __post_init__(self) -> None:
        for name in ("max_concurrent_jobs", "max_daily_jobs", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1_000_000_000:
                raise ValueError(f"{name}: got {value}, allowed is 1 to 1000000000, or nothing for no limit")


NO_LIMITS = KeyLimits()


def _as_it_is(path: str) -> str:
    return path


@dataclass(frozen=True)
class Caller:
    """Whoever makes a call."""

    role: Role
    key_id: str = ""
    """Of the API key; empty where none is asked for."""
    name: str = ""
    """Of the API key, for people."""
    limits: KeyLimits = NO_LIMITS
    only_job: str = ""
    """The one job that a signed link opens; empty: the role decides."""
    sign: Callable[[str], str] = field(default=_as_it_is, compare=False, repr=False)
    """Makes of a path of the HTTP port one that opens without a key."""

    @property
    def key_filter(self) -> str | None:
        """The key whose jobs this caller is shown; None: everybody's."""
        return self.key_id if self.role in (Role.USER, Role.WORKER) else None

    def sees(self, job_id: str, key_id: str) -> bool:
        """True if a job that was made with the key `key_id` may be shown to this caller."""
        if self.only_job:
            return job_id == self.only_job
        return self.key_filter is None or key_id == self.key_filter

    def require(self, action: Action) -> None:
        """Go on only if the role allows it.

        Raises:
            PermissionDenied: it does not; names the role that does.
        """
        if action in _ALLOWED[self.role] and not (self.only_job and action is not Action.READ):
            return
        needed = next(role for role in Role if action in _ALLOWED[role])
        whose = f"the API key {self.name!r}" if self.key_id else "this link"
        raise PermissionDenied(
            f"{whose} has the role {self.role.value}; this call needs {needed.value} or higher."
            f" An administrator makes such a key: ovi keys create NAME --role {needed.value}"
        )

    def require_job(self, job_id: str, key_id: str) -> None:
        """Go on only if this caller may see the job; otherwise it is as if there were none.

        Raises:
            NotFound: it may not.
        """
        if not self.sees(job_id, key_id):
            raise no_such_job(job_id)


LOCAL = Caller(Role.ADMIN, name="local")
"""Everybody, where no keys are asked for."""

_current: ContextVar[Caller] = ContextVar("caller")


def no_such_job(job_id: str) -> NotFound:
    """The same words for a job that is not there and for one that is not shown."""
    return NotFound(f"there is no job {job_id[:64]!r}; ListJobs shows what there is")


def current_caller() -> Caller:
    """Who makes the call that this task works on.

    Raises:
        LookupError: nobody was set: the way in has asked for no one, which is our mistake.
    """
    return _current.get()


def link(path: str) -> str:
    """A path of the HTTP port as it is told to the present caller: one that opens for a day, where keys are needed."""
    return _current.get(LOCAL).sign(path)


def act_as(caller: Caller) -> None:
    """From now on `current_caller` is this one, for the rest of the present task."""
    _current.set(caller)


@contextlib.contextmanager
def acting_as(caller: Caller) -> Iterator[None]:
    """Inside, `current_caller` is this one. Set by whatever lets calls in: gRPC, HTTP, Socket.IO."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)
