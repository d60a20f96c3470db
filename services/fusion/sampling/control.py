"""What a caller asks of a run while it goes on: its state every few steps, and to stop.

A run that is cut is to cost at most `checkpoint_steps` steps. So a state is given out one step before as many are at
stake, and travels while the next step is made. Where it is not kept by then, the run waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from services.fusion.sampling.denoise import RunState, StepDone
from shared.logging import get_logger

T = TypeVar("T")

log = get_logger(__name__)

LONGEST_WAIT_S = 10.0
"""How long a run waits for a state to be kept; the largest is 169 MB."""


@dataclass(frozen=True)
class StateGiven:
    """A state from which the run can go on; its tensors are the run's own and never written to again."""

    state: RunState
    settled: threading.Event = field(default_factory=threading.Event, compare=False)
    """To be set when the reader has kept it, or will not; the next is given out only then."""


class RunBegun:
    """The device's thread has turned to the run."""


class RunPaused:
    """The run has stopped, right after the state before it was given out, if there was one."""


class RunControl:
    """Between one run and whoever steers it: `steer` is used on the device's thread, all else on any."""

    def __init__(self, checkpoint_steps: int, *, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        """
        Args:
            checkpoint_steps: most steps that a cut costs; 0: any number, only a pause gives a state out. With a step
                cache a state is known a step later, so it is no fewer than 2, and reused steps come on top that are
                made when a state is due.
            longest_wait_s: for a state to be kept. Then the run goes on, and its next state is given out only after
                that one was settled.
        """
        self._checkpoint_steps = checkpoint_steps
        self._longest_wait_s = longest_wait_s
        self._lock = threading.Lock()
        self._running = False
        self._pause_wanted = False
        self._left = False
        self._settled = threading.Event()
        """Of the last state that was given out."""
        self._has_said_late = False
        self._waited_s = 0.0

    def pause(self) -> bool:
        """Stop the run after its present step, or with a step cache after the next one that is computed.

        Returns:
            False: it has not begun, or has ended. True: it stops, unless it ends first.
        """
        with self._lock:
            self._pause_wanted = self._running
            return self._running

    def leave(self) -> None:
        """Nobody reads any more what the run gives out: if it waits for that, it ends at once."""
        with self._lock:
            self._left = True
            self._settled.set()

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
                yield from self._steered(run, _Stake(self._checkpoint_steps, steps_done))
        finally:
            with self._lock:
                self._running = False
            if self._waited_s:
                log.info("waited for checkpoints to be kept", seconds=round(self._waited_s, 3))

    def _steered(self, run: Iterator[T | StepDone], stake: _Stake) -> Iterator[T | StepDone | StateGiven | RunPaused]:
        for event in run:
            if not isinstance(event, StepDone):
                yield event
                continue
            yield replace(event, state=None)
            stake.made(event)
            self._wait(stake)
            state = event.state
            if state is not None and self._pause_wanted:
                if state.steps_done > stake.given_at:
                    yield self._give(state, stake)
                yield RunPaused()
                return
            if state is not None and stake.is_due(state):
                yield self._give(state, stake)
                self._wait(stake)
            if self._left:
                return

    def _give(self, state: RunState, stake: _Stake) -> StateGiven:
        given = StateGiven(state)
        stake.gave(state.steps_done, given.settled)
        with self._lock:
            self._settled = given.settled
            if self._left:
                given.settled.set()
        return given

    def _wait(self, stake: _Stake) -> None:
        """Before a step that would be one too many; on several ranks the others wait for rank 0's word meanwhile."""
        if not stake.is_full:
            return
        begun_s = time.monotonic()
        in_time = self._settled.wait(self._longest_wait_s)
        self._waited_s += time.monotonic() - begun_s
        if in_time:
            return
        stake.stop_waiting()
        if not self._has_said_late:
            self._has_said_late = True
            what = "a checkpoint is not kept in time; the run goes on, and a cut may cost more steps than it should"
            log.warning(what, steps_done=stake.given_at, waited_s=self._longest_wait_s)


class _Stake:
    """What a cut would cost: steps that were made since the state that is kept."""

    def __init__(self, limit: int, steps_done: int) -> None:
        self._limit = limit
        self._made = self._kept = self._to_be_kept = steps_done
        self._total = 0
        self.given_at = steps_done
        """Steps of the state that was given out last."""
        self._settled: threading.Event | None = None
        """Of a state that is on its way."""
        self._waits = False

    def made(self, step: StepDone) -> None:
        """A step was made."""
        if step.index <= self._made:  # the run has begun again, and what was given out is of no use to it
            self._kept = self._to_be_kept = self.given_at = 0
        self._made, self._total = step.index, step.total

    def gave(self, steps_done: int, settled: threading.Event) -> None:
        """A state was given out."""
        self.given_at = self._to_be_kept = steps_done
        self._settled, self._waits = settled, True

    def stop_waiting(self) -> None:
        """The state on its way is too slow; the steps until it has come are made at risk."""
        self._waits = False

    def is_due(self, state: RunState) -> bool:
        """Whether this state is to be given out now: none is on its way, and the rest of the run is too long."""
        if not self._limit or self._is_on_its_way or state.steps_done <= self.given_at:
            return False
        return self._made - self.given_at >= self._limit - 1 and self._total - self.given_at > self._limit

    @property
    def is_full(self) -> bool:
        """Whether the next step has to wait for the state on its way."""
        return self._is_on_its_way and self._waits and self._made + 1 - self._kept > self._limit

    @property
    def _is_on_its_way(self) -> bool:
        if self._settled is not None and self._settled.is_set():
            self._kept, self._settled = self._to_be_kept, None
        return self._settled is not None
