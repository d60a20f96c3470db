"""The workers of one stage as this gateway knows them: they come and go, and each call is given to one of them."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from services.gateway.workers.choosing import ANYTHING, Report, Standing, Wish, WorkerState, choose, pause_s
from shared.errors import CheckpointError, Internal, OutOfMemory, OviError, ResourceExhausted, Unavailable
from shared.logging import get_logger
from shared.places import Place

log = get_logger(__name__)

_LACKED_MEMORY_S = 60.0
"""How long a worker that refused a call for want of memory is asked for the like only after all others."""
_PATIENCE_S = 15.0
"""How long a worker that is slow to answer is taken to be as it was."""


class WorkerCut(Unavailable):
    """The connection to a worker broke during a call, or could not be made: the worker crashed or is not started."""


class WorkerSource(enum.Enum):
    """How the gateway knows of a worker."""

    ADDRESS = "address"
    NAME = "name"
    REGISTERED = "registered"


@dataclass(frozen=True)
class Origin:
    """Who says where workers are."""

    source: WorkerSource
    name: str = ""
    """That was looked up."""


class Worker(Protocol):
    """A client of one worker."""

    @property
    def address(self) -> str: ...

    async def close(self) -> None: ...


W = TypeVar("W", bound=Worker)
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerView:
    """A worker as an operator sees it."""

    stage: str
    address: str
    source: WorkerSource
    state: WorkerState
    reason: str
    """Why it takes no work, or is passed over."""
    report: Report | None
    num_pending: int
    """Calls that wait or are under way there."""
    job_ids: tuple[str, ...]
    """This gateway's of these."""
    passed_over_s: float


class _Member(Generic[W]):
    """What is known of one worker."""

    def __init__(self, worker: W, now_s: float) -> None:
        self.worker = worker
        self.origins: set[Origin] = set()
        self.state = WorkerState.UNKNOWN
        self.reason = ""
        self.report: Report | None = None
        self.answered_s = now_s
        """When it last told of itself, or came."""
        self.job_ids: list[str] = []
        self.num_given = 0
        self.others_pending = 0
        self.num_failures = 0
        self.failure = ""
        self.passed_over_until_s = float("-inf")
        self.lacking: dict[Wish, float] = {}

    @property
    def num_pending(self) -> int:
        return len(self.job_ids) + self.others_pending


class Replicas(Generic[W]):
    """The workers of a stage."""

    def __init__(self, stage: str, connect: Callable[[Place], W], clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            stage: its name.
            connect: makes the client of a worker.
            clock: seconds; tests put their own in.
        """
        self.name = stage
        """Of the stage."""
        self._connect = connect
        self._clock = clock
        self._members: dict[Place, _Member[W]] = {}
        self._leaving: dict[Place, _Member[W]] = {}
        """Those that are given nothing more, and are still at something."""
        self._closing: set[asyncio.Task[None]] = set()

    def place(self, origin: Origin, places: Iterable[Place]) -> None:
        """Set where the workers are that one origin knows; those that nobody knows any more get no further calls."""
        wanted = dict.fromkeys(places)  # in the order given: of equal ones the first is taken first
        for place in wanted:
            member = self._members.get(place)
            if member is None:
                member = self._leaving.pop(place, None) or _Member(self._connect(place), self._clock())
                self._members[place] = member
                log.info("a worker has come", stage=self.name, address=place.address, source=origin.source.value)
            member.origins.add(origin)
        for place, member in list(self._members.items()):
            if place not in wanted:
                member.origins.discard(origin)
            if not member.origins:
                log.info("a worker has gone", stage=self.name, address=place.address, source=origin.source.value)
                self._leaving[place] = self._members.pop(place)
                self._close_if_idle(place)

    @property
    def workers(self) -> tuple[W, ...]:
        """All of them, in the order in which they came."""
        return tuple(member.worker for member in self._members.values())

    @property
    def num_up(self) -> int:
        """How many take work, as far as is known; at least 1 if there is any."""
        number = sum(member.state.is_up for member in self._members.values())
        return max(number, 1) if self._members else 0

    def choose(self, wish: Wish = ANYTHING, tried: Collection[W] = ()) -> W:
        """The worker that a call is given to.

        Args:
            wish: of the call.
            tried: where it has failed already; chosen again only if there is no other.

        Raises:
            Unavailable: there is none, or none that has the variant.
        """
        members = list(self._members.values())
        index = choose([self._standing(member, wish, tried) for member in members], wish)
        if index is not None:
            return members[index].worker
        if members:
            raise Unavailable(f"no {self.name} service that is known has {wish.model!r}")
        raise self._nobody()

    def has_other(self, wish: Wish, tried: Collection[W]) -> bool:
        """Whether another worker may do what failed at these."""
        standings = [self._standing(member, wish, tried) for member in self._members.values()]
        return any(one.can_do(wish) and one.state.is_up and not one.was_tried for one in standings)

    def is_leaving(self, worker: W) -> bool:
        """Whether it said that it takes no more work before it was lost."""
        member = self._member(worker)
        return member is not None and member.state is WorkerState.NOT_SERVING

    @contextmanager
    def using(self, worker: W, wish: Wish = ANYTHING, job_id: str = "") -> Iterator[None]:
        """Around a call: the worker is busy with it, and passed over for a while if it fails."""
        member = self._member(worker)
        if member is None:  # it left between the choice and the call
            raise Unavailable(f"the {self.name} service at {worker.address} has just left")
        member.job_ids.append(job_id)
        member.num_given += 1
        try:
            yield
        except OutOfMemory:
            now_s = self._clock()
            member.lacking = {asked: until_s for asked, until_s in member.lacking.items() if until_s > now_s}
            member.lacking[wish] = now_s + _LACKED_MEMORY_S
            raise
        except (Unavailable, ResourceExhausted, Internal, CheckpointError) as error:
            self._note_failure(member, error)
            raise
        else:
            member.num_failures = 0
        finally:
            member.job_ids.remove(job_id)
            for place, leaving in list(self._leaving.items()):
                if leaving is member:
                    self._close_if_idle(place)

    async def on_one(self, call: Callable[[W], Awaitable[T]], wish: Wish = ANYTHING, job_id: str = "") -> T:
        """The result of a call of one worker.

        Raises:
            OviError: what the call raises.
        """
        worker = self.choose(wish)
        with self.using(worker, wish, job_id):
            return await call(worker)

    async def of_all(self, ask: Callable[[W], Awaitable[T]]) -> list[T]:
        """What the workers that are up, or else all of them, answer to a question, in order; without those that fail.

        Raises:
            OviError: all failed; that of the first.
        """
        members = [member for member in self._members.values() if member.state.is_up] or list(self._members.values())
        if not members:
            raise self._nobody()
        results = await asyncio.gather(*(ask(member.worker) for member in members), return_exceptions=True)
        if unexpected := [one for one in results if isinstance(one, BaseException) and not isinstance(one, OviError)]:
            raise unexpected[0]
        answers = [one for one in results if not isinstance(one, BaseException)]
        if not answers:
            assert isinstance(results[0], OviError)
            raise results[0]
        return answers

    def note_report(self, worker: W, report: Report) -> None:
        """A worker has told of itself."""
        member = self._member(worker)
        if member is None:
            return
        state, reason = WorkerState.SERVING, ""
        if report.stage != self.name:
            state, reason = WorkerState.NOT_SERVING, f"it is a {report.stage[:40]} service"
        self._enter(member, state, reason)
        member.report = report
        member.answered_s = self._clock()
        member.others_pending = max(0, report.num_pending - len(member.job_ids))

    def note_silence(self, worker: W, state: WorkerState, reason: str, *, is_slow: bool = False) -> None:
        """A worker has not told of itself.

        Args:
            worker: which.
            state: what that means.
            reason: why, for people.
            is_slow: nothing came in time; it may be busy, and is taken to be as it was for a while.
        """
        member = self._member(worker)
        if member is None or (is_slow and self._clock() - member.answered_s < _PATIENCE_S):
            return
        self._enter(member, state, reason)
        member.others_pending = 0

    def views(self) -> list[WorkerView]:
        """All of them, by address."""
        now_s = self._clock()
        views = []
        for place, member in sorted(self._members.items(), key=lambda item: item[0].address):
            passed_over_s = max(0.0, member.passed_over_until_s - now_s)
            view = WorkerView(
                stage=self.name,
                address=place.address,
                source=min((origin.source for origin in member.origins), key=list(WorkerSource).index),
                state=member.state,
                reason=member.reason or (member.failure if passed_over_s else ""),
                report=member.report,
                num_pending=member.num_pending,
                job_ids=tuple(job_id for job_id in member.job_ids if job_id),
                passed_over_s=passed_over_s,
            )
            views.append(view)
        return views

    async def close(self) -> None:
        """Close the connections."""
        members = [*self._members.values(), *self._leaving.values()]
        await asyncio.gather(*(member.worker.close() for member in members), *self._closing)

    def _standing(self, member: _Member[W], wish: Wish, tried: Collection[W]) -> Standing:
        now_s = self._clock()
        return Standing(
            state=member.state,
            report=member.report,
            num_pending=member.num_pending,
            num_given=member.num_given,
            is_passed_over=member.passed_over_until_s > now_s,
            lacked_memory=member.lacking.get(wish, float("-inf")) > now_s,
            was_tried=member.worker in tried,
        )

    def _note_failure(self, member: _Member[W], error: OviError) -> None:
        member.failure = error.message
        if member.state.is_up:
            member.num_failures += 1
        member.passed_over_until_s = self._clock() + pause_s(member.num_failures)
        if isinstance(error, WorkerCut) and member.state.is_up:
            self._enter(member, WorkerState.UNREACHABLE, error.message)

    def _enter(self, member: _Member[W], state: WorkerState, reason: str) -> None:
        if state is not member.state:
            address = member.worker.address
            log.info("a worker is " + state.value, stage=self.name, address=address, reason=reason)
        member.state, member.reason = state, reason

    def _member(self, worker: W) -> _Member[W] | None:
        members = (*self._members.values(), *self._leaving.values())
        return next((member for member in members if member.worker is worker), None)

    def _close_if_idle(self, place: Place) -> None:
        if not self._leaving[place].job_ids:
            self._beside(self._leaving.pop(place).worker.close())

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _nobody(self) -> Unavailable:
        return Unavailable(f"no {self.name} service is known yet; is one started, or registered?")
