"""What a caller asks of a run while it goes on: its state every few steps, and to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

from services.fusion.sampling.denoise import RunState, StepDone

T = TypeVar("T")


class OnItsWay:
    """A state that was given out, until its reader has it; the next is given out only then."""

    def __init__(self) -> None:
        self.is_held: Callable[[], bool] = lambda: True
        """Whether the reader may still want it; called on the device's thread."""


@dataclass(frozen=True)
class StateGiven:
    """A state from which the run can go on; its tensors are the run's own and never written to again."""

    state: RunState
    on_its_way: OnItsWay


class RunBegun:
    """The device's thread has turned to the run."""


class RunPaused:
    """The run has stopped, right after the state before it was given out, if there was one."""


class RunControl:
    """Between one run and whoever steers it: `steer` is used on the device's thread, `pause` on any."""

    def __init__(self, checkpoint_steps: int) -> None:
        """
        Args:
            checkpoint_steps: from one state that is given out to the next; 0: only a pause gives one out.
        """
        self._checkpoint_steps = checkpoint_steps
        self._lock = threading.Lock()
        self._running = False
        self._pause_wanted = False

    def pause(self) -> bool:
        """Stop the run after its present step, or with a step cache after the next one that is computed.

        Returns:
            False: it has not begun, or has ended. True: it stops, unless it ends first.
        """
        with self._lock:
            self._pause_wanted = self._running
            return self._running

    def steer(
        self, run: Generator[T | StepDone, None, None], steps_done: int
    ) -> Iterator[T | StepDone | RunBegun | StateGiven | RunPaused]:
        """The events of a run, without the states of its steps, and what was asked for.

        Args:
            run: from the engine; closed at the end.
            steps_done: after how many steps it begins.
        """
        with self._lock:
            self._running = True
        try:
            with closing(run):
                yield RunBegun()
                yield from self._steered(run, steps_done)
        finally:
            with self._lock:
                self._running = False

    def _steered(self, run: Iterator[T | StepDone], given_at: int) -> Iterator[T | StepDone | StateGiven | RunPaused]:
        on_its_way: OnItsWay | None = None
        for event in run:
            if not isinstance(event, StepDone):
                yield event
                continue
            yield replace(event, state=None)
            state = event.state
            if state is None:
                continue
            if self._pause_wanted:
                if state.steps_done:
                    yield StateGiven(state, OnItsWay())
                yield RunPaused()
                return
            if state.steps_done < given_at:
                given_at = 0  # the run has begun again
            due = self._checkpoint_steps and state.steps_done - given_at >= self._checkpoint_steps
            if due and (on_its_way is None or not on_its_way.is_held()):
                given_at, on_its_way = state.steps_done, OnItsWay()
                yield StateGiven(state, on_its_way)
