"""When a run gives its state out and when it waits: a cut costs no more steps than were allowed, whoever is slow."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch
from structlog.testing import capture_logs

from services.fusion.sampling.control import RunBegun, RunControl, RunPaused, StateGiven
from services.fusion.sampling.denoise import Latents, RunState, StepDone

SOON_S = 30.0
"""Longer than anything here takes."""
NEVER_S = 3600.0
RESULT = "the result"


def state_at(steps_done: int) -> RunState:
    return RunState(steps_done, 0, Latents(torch.zeros(1), torch.zeros(1)), {}, {})


class Run:
    """A run's events, how many steps it began, and whether it was closed."""

    def __init__(self, states: Iterable[int | None], total: int = 30, lowered_after: int = 0) -> None:
        """
        Args:
            states: steps_done of the state of each step; None: no state.
            total: of steps.
            lowered_after: so many steps it begins again; 0: it does not.
        """
        self.begun = 0
        """Index of the step that was begun last."""
        self.closed = False
        self.events = self._make(list(states), total, lowered_after)

    def _make(self, states, total, lowered_after):
        first = total - len(states)
        try:
            for index in range(1, lowered_after + 1):
                self.begun += 1
                yield StepDone(index, total, 1.0, 0.1, state=state_at(index))
            if lowered_after:
                yield "lowered"
                self.begun = 0
            for index, number in enumerate(states, start=first + 1):
                self.begun = index
                yield StepDone(index, total, 1.0, 0.1, state=None if number is None else state_at(number))
            yield RESULT
        finally:
            self.closed = True


def whole(total: int, first: int = 0) -> Run:
    """A run without a step cache, which has a state after each step but the last."""
    return Run([*range(first + 1, total), None], total)


def cached(total: int, reused: set[int]) -> Run:
    """A run with a step cache, which has the state before each step that was computed."""
    last = {total, *reused}
    return Run([None if index in last else index - 1 for index in range(1, total + 1)], total)


def given(control: RunControl, run: Run, steps_done: int = 0) -> list[object]:
    """What comes of a run whose reader is at once done with each state; states as their number, no steps."""
    seen: list[object] = []
    for event in control.steer(run.events, steps_done):
        if isinstance(event, StepDone):
            assert event.state is None, "a state does not leave with its step"
            continue
        if isinstance(event, StateGiven):
            event.settled.set()
            event = event.state.steps_done
        seen.append(event if isinstance(event, int | str) else type(event))
    assert run.closed
    return seen


class Reader:
    """Reads a run on a thread, as the device's does, and keeps states only when it is told to."""

    def __init__(self, control: RunControl, run: Run, steps_done: int = 0) -> None:
        self._events = control.steer(run.events, steps_done)
        self._states: list[StateGiven] = []
        self._came = threading.Condition()
        self.seen: list[object] = []
        self.made = 0
        self.kept = steps_done
        self.worst = 0
        """Most steps that were at stake at any time."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for event in self._events:
            with self._came:
                if isinstance(event, StepDone):
                    self.made = event.index
                    self.worst = max(self.worst, self.made - self.kept)
                elif isinstance(event, StateGiven):
                    self._states.append(event)
                else:
                    self.seen.append(event if isinstance(event, str) else type(event))
                self._came.notify_all()

    def until_given(self) -> StateGiven:
        """The next state, when it comes."""
        with self._came:
            assert self._came.wait_for(lambda: self._states, SOON_S), f"none came after step {self.made}"
            return self._states.pop(0)

    def until_made(self, steps: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: self.made >= steps, SOON_S), f"stands at step {self.made}"

    @property
    def untaken(self) -> list[StateGiven]:
        """States that came and were not asked for."""
        return self._states

    def keep(self, state: StateGiven) -> None:
        with self._came:
            self.kept = state.state.steps_done
        state.settled.set()

    def ended(self, within_s: float = SOON_S) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()


@pytest.mark.parametrize(
    ("limit", "total", "expected"),
    [
        (10, 50, [9, 18, 27, 36, 45]),
        (10, 46, [9, 18, 27, 36]),
        (10, 11, [9]),
        (10, 10, []),
        (3, 10, [2, 4, 6, 8]),
        (2, 5, [1, 2, 3]),
        (1, 4, [1, 2, 3]),
        (0, 30, []),
    ],
)
def test_a_state_in_time_and_none_where_the_rest_is_short(limit, total, expected) -> None:
    assert given(RunControl(limit), whole(total)) == [RunBegun, *expected, RESULT]


def test_it_counts_from_where_it_begins() -> None:
    assert given(RunControl(3), whole(12, first=5), 5) == [RunBegun, 7, 9, RESULT]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_reader_that_is_slow_is_waited_for(limit) -> None:
    """The reader keeps a state only when the run can go no further: never are more steps at stake than allowed."""
    run = whole(20)
    reader = Reader(RunControl(limit, longest_wait_s=NEVER_S), run)
    while reader.kept + limit < 20:
        state = reader.until_given()
        stop = reader.kept + limit
        reader.until_made(stop)
        assert not reader.ended(within_s=0.05) and run.begun == stop, "a step more was begun"
        reader.keep(state)
    assert reader.ended() and reader.seen == [RunBegun, RESULT]
    assert reader.worst == limit


def test_one_step_is_made_while_a_state_travels() -> None:
    run = whole(30)
    reader = Reader(RunControl(10, longest_wait_s=NEVER_S), run)
    state = reader.until_given()
    reader.until_made(10)
    assert state.state.steps_done == 9
    reader.keep(state)
    reader.until_made(19)
    assert reader.until_given().state.steps_done == 18


def test_a_reader_that_never_keeps_is_waited_for_once() -> None:
    with capture_logs() as logs:
        reader = Reader(RunControl(5, longest_wait_s=0.1), whole(30))
        assert reader.ended() and reader.seen == [RunBegun, RESULT]
    assert reader.until_given().state.steps_done == 4 and not reader.untaken
    (said,) = (entry for entry in logs if entry["log_level"] == "warning")
    assert said["steps_done"] == 4 and "not kept in time" in said["event"]


def test_after_a_late_reader_the_bound_holds_again() -> None:
    with capture_logs() as logs:
        control = RunControl(5, longest_wait_s=0.1)
        reader = Reader(control, whole(1000))
        late = reader.until_given()
        reader.until_made(8)
        reader.keep(late)
        for _ in range(3):
            late = reader.until_given()
            reader.until_made(late.state.steps_done + 1)
            reader.keep(late)
    assert len([entry for entry in logs if entry["log_level"] == "warning"]) == 1, "it is said once"
    control.leave()
    assert reader.ended()


def test_who_leaves_is_not_waited_for() -> None:
    run = whole(30)
    control = RunControl(5, longest_wait_s=NEVER_S)
    reader = Reader(control, run)
    reader.until_given()
    reader.until_made(5)
    control.leave()
    assert reader.ended() and run.begun == 5 and run.closed, "and no step is begun for nobody"


def test_who_has_left_before_a_state_was_given_is_not_waited_for() -> None:
    run = whole(30)
    control = RunControl(5, longest_wait_s=NEVER_S)
    control.leave()
    assert Reader(control, run).ended() and run.begun <= 1 and run.closed


def test_a_run_that_begins_again_counts_from_its_first_step() -> None:
    """A state of before, which comes late, saves nothing of it, and no other is given out until it was settled."""
    run = Run([*range(1, 30), None], 30, lowered_after=4)
    reader = Reader(RunControl(5, longest_wait_s=NEVER_S), run)
    state = reader.until_given()
    assert state.state.steps_done == 4
    reader.until_made(5)
    assert not reader.ended(within_s=0.05) and run.begun == 5 and reader.seen == [RunBegun, "lowered"]
    state.settled.set()
    state = reader.until_given()
    assert state.state.steps_done == 5 and not reader.ended(within_s=0.05) and run.begun == 5
    reader.keep(state)
    assert reader.until_given().state.steps_done == 9


def test_with_a_step_cache_the_bound_counts_the_step_that_tells() -> None:
    """A state is that before the step, so it is given out when one step is at stake already."""
    assert given(RunControl(5), cached(20, set())) == [RunBegun, 3, 6, 9, 12, 15, RESULT]
    assert given(RunControl(1), cached(4, set())) == [RunBegun, 1, 2, RESULT]
    run = cached(20, set())
    reader = Reader(RunControl(5, longest_wait_s=NEVER_S), run)
    state = reader.until_given()
    reader.until_made(5)
    assert not reader.ended(within_s=0.05) and run.begun == 5
    reader.keep(state)
    assert reader.until_given().state.steps_done == 6


def test_reused_steps_make_a_state_later_by_as_many() -> None:
    assert given(RunControl(4), cached(16, {3, 4, 5})) == [RunBegun, 5, 7, 9, 11, 13, RESULT]


def test_a_pause_gives_the_state_and_stops() -> None:
    control = RunControl(0)
    assert not control.pause(), "it has not begun"
    run = whole(10)
    events = control.steer(run.events, 0)
    assert isinstance(next(events), RunBegun) and isinstance(next(events), StepDone)
    assert control.pause()
    state, paused = events
    assert state.state.steps_done == 1 and isinstance(paused, RunPaused) and run.closed
    assert not control.pause(), "it has ended"


def test_a_pause_while_a_state_travels_gives_a_later_one() -> None:
    run = whole(30)
    control = RunControl(5, longest_wait_s=NEVER_S)
    reader = Reader(control, run)
    first = reader.until_given()
    reader.until_made(5)
    assert control.pause()
    reader.keep(first)
    assert reader.until_given().state.steps_done == 5
    assert reader.ended() and reader.seen == [RunBegun, RunPaused] and run.begun == 5


def test_a_pause_waits_for_a_state_and_lets_the_last_step_end_the_run() -> None:
    for states, expected in (((None, None, 2, 3), [2, RunPaused]), ((None,), [RESULT]), ((0, 1), [RunPaused])):
        control = RunControl(0)
        run = Run(states, len(states))
        events = control.steer(run.events, 0)
        assert isinstance(next(events), RunBegun)
        assert control.pause()
        rest = [event for event in events if not isinstance(event, StepDone)]
        seen = [event.state.steps_done if isinstance(event, StateGiven) else event for event in rest]
        assert [each if isinstance(each, int | str) else type(each) for each in seen] == expected and run.closed
