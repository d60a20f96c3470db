"""One thread owns the device; work waits in a bounded queue and never runs on the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from shared.errors import ResourceExhausted
from shared.logging import get_logger

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True)
class Cuts:
    """Jobs that were cancelled while the device was at them."""

    number: int = 0
    seconds: float = 0.0
    """From each cancel until the device was free, in all."""


@dataclass
class _Job(Generic[T]):
    work: Callable[[], Iterator[T]]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: bool = False
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """Of the caller, so that log lines of the device thread carry the request id."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """On the device thread: whether the job is still wanted; from then on its end is posted."""
        with self.lock:
            self.begun = not self.cancelled.is_set()
            return self.begun

    def cancel(self) -> bool:
        """On the event loop: ask for a stop; True if the job has begun and will post its end."""
        with self.lock:
            self.cancelled.set()
            return self.begun

    def post(self, kind: str, value: Any) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))


class DeviceWorker:
    """Runs generators one after another on its own thread.

    Cancelling the consumer stops the generator at its next `yield`: between two steps, never inside one.
    """

    def __init__(self, name: str, *, max_pending: int, device: torch.device | None = None) -> None:
        """
        Args:
            name: of the thread, and of the queue in messages.
            max_pending: most jobs waiting or running; further ones are refused.
            device: the thread's own, if it is a GPU; kernels are launched on whichever one is the thread's.
        """
        self._device = device
        self._name = name
        self._max_pending = max_pending
        self._queue: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._pending = 0
        self.cuts = Cuts()
        """So far."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Jobs waiting or running."""
        return self._pending

    async def stream(self, work: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What `work` yields, as it yields it. `work` is called on the device thread.

        Raises:
            ResourceExhausted: the queue is full.
            Exception: whatever `work` raises.
        """
        if self._pending >= self._max_pending:
            raise ResourceExhausted(
                f"the {self._name} queue is full ({self._pending} of {self._max_pending}); try again later"
            )
        job = _Job(work, asyncio.get_running_loop())
        self._pending += 1
        self._queue.put(job)
        ended = False
        try:
            while True:
                kind, value = await job.events.get()
                ended = kind != "item"
                if kind == "item":
                    yield value
                elif kind == "error":
                    raise value
                else:
                    return
        finally:
            if job.cancel() and not ended:
                cut_s = time.monotonic()
                await asyncio.shield(self._drained(job))
                self._note_cut(time.monotonic() - cut_s)
            self._pending -= 1

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, called on the device thread.

        Raises:
            ResourceExhausted: the queue is full.
            Exception: whatever `work` raises.
        """

        def once() -> Iterator[T]:
            yield work()

        results = [item async for item in self.stream(once)]
        return results[0]

    def close(self, timeout_s: float = 60.0) -> bool:
        """End the thread after the job it is at; jobs still waiting are not begun. False: it is still at that job."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        if not ended:
            log.warning("the device thread is still at work", worker=self._name, waited_s=timeout_s)
        return ended

    def _note_cut(self, seconds: float) -> None:
        log.info("work was cancelled", worker=self._name, device_free_after_s=round(seconds, 3))
        self.cuts = Cuts(self.cuts.number + 1, self.cuts.seconds + seconds)

    @staticmethod
    async def _drained(job: _Job[Any]) -> None:
        while (await job.events.get())[0] == "item":
            pass

    def _run(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (job := self._queue.get()) is not None:
            if not job.begin():
                continue
            try:
                job.context.run(self._iterate, job)
                job.post("end", None)
            except Exception as error:
                job.post("error", error)

    @staticmethod
    def _iterate(job: _Job[Any]) -> None:
        items = iter(job.work())
        try:
            for item in items:
                job.post("item", item)
                if job.cancelled.is_set():
                    return
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
