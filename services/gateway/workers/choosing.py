"""Which of several workers of a stage gets a call. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from shared.memory.modes import VramMode


class WorkerState(enum.Enum):
    """Whether a worker is given work."""

    UNKNOWN = "unknown"
    """Not asked yet."""
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    """It loads or drains, or is another service than expected."""
    UNREACHABLE = "unreachable"

    @property
    def is_up(self) -> bool:
        """True unless it is known that it takes no work."""
        return self in (WorkerState.SERVING, WorkerState.UNKNOWN)


@dataclass(frozen=True)
class Report:
    """What a worker says of itself."""

    stage: str
    """Name of its service."""
    models: tuple[str, ...] = ()
    """Variants that it can run; empty at stages that have none."""
    loaded_model: str = ""
    """Variant whose weights are loaded; empty: none."""
    loaded_mode: VramMode = VramMode.AUTO
    """Mode in which they are loaded; AUTO: none are."""
    loaded_loras: tuple[str, ...] = ()
    mode: VramMode = VramMode.AUTO
    """Mode of work that names none."""
    allocation: str = ""
    """How the work is spread over GPUs."""
    device: str = ""
    """Uuid of the device that it computes on, or its name."""
    free_bytes: int = 0
    """Memory of that device that nobody has."""
    total_bytes: int = 0
    num_pending: int = 0
    """Calls that wait or are under way there, of all gateways."""
    num_cut: int = 0
    """Calls that were cancelled while the device was at them."""
    cut_s: float = 0.0
    """From each such cancel until the device was free, in all."""


@dataclass(frozen=True)
class Wish:
    """What a call wants of a worker."""

    model: str = ""
    """Variant; empty: none, or any."""
    mode: VramMode = VramMode.AUTO
    """AUTO: the worker's own."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels; only remembered where memory was lacking."""


ANYTHING = Wish()


@dataclass(frozen=True)
class Standing:
    """A worker as it is at the moment of a choice."""

    state: WorkerState = WorkerState.UNKNOWN
    report: Report | None = None
    """The last one; None: it has told nothing."""
    num_pending: int = 0
    """Calls that wait or are under way there."""
    num_given: int = 0
    """Calls that it was given by this gateway so far."""
    is_passed_over: bool = False
    """A call failed there a moment ago."""
    lacked_memory: bool = False
    """It refused a call like this a moment ago for want of memory."""
    was_tried: bool = False
    """This very call has failed there."""

    def can_do(self, wish: Wish) -> bool:
        """False if it is known that it has not the variant."""
        return self.report is None or not wish.model or not self.report.models or wish.model in self.report.models

    def must_switch(self, wish: Wish) -> bool:
        """Whether it has to load another variant, or the same in another mode; who has told nothing may have to."""
        if self.report is None:
            return True
        mode = self.report.mode if wish.mode is VramMode.AUTO else wish.mode
        other_model = bool(wish.model) and self.report.loaded_model != wish.model
        return other_model or self.report.loaded_mode is not mode


def choose(standings: Sequence[Standing], wish: Wish = ANYTHING) -> int | None:
    """Index of the worker that gets a call; None if none of them can do it.

    One that serves goes before one that does not, whatever else there is. Of those the one with the least work, since
    switching takes less time than waiting for somebody else's run; of these one that has loaded what is needed; of
    these the one that was given least.
    """

    def rank(index: int) -> tuple[bool, bool, bool, bool, bool, int, bool, int]:
        one = standings[index]
        return (
            one.was_tried,
            not one.state.is_up,
            one.state is WorkerState.UNREACHABLE,
            one.lacked_memory,
            one.is_passed_over,
            one.num_pending,
            one.must_switch(wish),
            one.num_given,
        )

    return min((index for index, one in enumerate(standings) if one.can_do(wish)), key=rank, default=None)


def job_slots(fixed: int, num_workers: int, num_gateways: int) -> int:
    """Jobs that one gateway works on at once.

    Args:
        fixed: as the operator wants it; 0: by the number of workers.
        num_workers: of the stage that takes longest; while there is none, nothing is begun.
        num_gateways: that take jobs from the same queue.
    """
    if not num_workers:
        return 0
    # Two more than are denoised: one is encoded and one decoded meanwhile.
    return fixed or -(-num_workers // num_gateways) + 2


FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


def pause_s(num_failures: int) -> float:
    """How long a worker is passed over while there are others, after so many failed calls in a row."""
    return min(FIRST_PAUSE_S * 2.0 ** min(num_failures - 1, 16), LONGEST_PAUSE_S) if num_failures else 0.0
