"""Which job is set aside: only for one that goes before it, only if it is worth it, never in circles."""

from __future__ import annotations

import pytest

from services.gateway.jobs.admission import AGEING_S
from services.gateway.jobs.domain import ClipParameters, Job, Submission, new_job_id
from services.gateway.jobs.giving_way import LEAST_STEPS_LEFT, Denoise, who_gives_way
from shared.sampling_options import SamplingOptions

PARAMETERS = ClipParameters("a cat", "", "", "tiny", 64, 96, 121, SamplingOptions())


def job(priority: int, create_time_s: float = 0.0) -> Job:
    return Job(new_job_id(), PARAMETERS, create_time_s, Submission(priority=priority))


LOW, MIDDLE, HIGH = job(1), job(5), job(9)


def test_the_device_goes_to_who_waits_with_a_higher_priority() -> None:
    assert who_gives_way([Denoise(LOW, True, 40)], HIGH, 1) == LOW.id
    assert who_gives_way([Denoise(LOW, True, 40), Denoise(HIGH, False, 50)], None, 1) == LOW.id


@pytest.mark.parametrize("head", [None, LOW, MIDDLE, job(5, -10.0)])
def test_nobody_gives_way_to_an_equal_or_a_lower_one(head) -> None:
    assert who_gives_way([Denoise(MIDDLE, True, 40), Denoise(job(5), False, 50)], head, 1) is None


def test_not_to_one_that_the_queue_takes_later() -> None:
    """A job that has waited long enough has caught up with the higher priority: it would be taken again at once."""
    aged = job(1)
    assert who_gives_way([Denoise(aged, True, 40)], job(3, 2 * AGEING_S - 1), 1) == aged.id
    assert who_gives_way([Denoise(aged, True, 40)], job(3, 2 * AGEING_S), 1) is None


def test_not_shortly_before_the_end() -> None:
    assert who_gives_way([Denoise(LOW, True, LEAST_STEPS_LEFT - 1)], HIGH, 1) is None
    assert who_gives_way([Denoise(LOW, True, LEAST_STEPS_LEFT)], HIGH, 1) == LOW.id


def test_not_while_a_worker_has_nothing_to_do() -> None:
    assert who_gives_way([Denoise(LOW, True, 40)], HIGH, 2) is None
    assert who_gives_way([], HIGH, 1) is None


def test_of_several_the_least_and_of_equals_the_one_with_most_left() -> None:
    other = job(1)
    denoises = [Denoise(MIDDLE, True, 50), Denoise(LOW, True, 20), Denoise(other, True, 30)]
    assert who_gives_way(denoises, HIGH, 3) == other.id
    assert who_gives_way(denoises[:2], HIGH, 2) == LOW.id
