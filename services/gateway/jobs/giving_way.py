"""Which job is set aside for one of higher priority. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.jobs.admission import rank
from services.gateway.jobs.domain import Job

LEAST_STEPS_LEFT = 5
"""A denoise with fewer steps left ends sooner than its going away and coming back would pay for."""


@dataclass(frozen=True)
class Denoise:
    """A job at its denoise."""

    job: Job
    on_device: bool
    """False: it waits for the device."""
    steps_left: int


def who_gives_way(denoises: Sequence[Denoise], head: Job | None, num_workers: int) -> str | None:
    """Id of the job that is set aside; None if all go on.

    A job gives way only to one that goes before it in the queue, too: it would be taken again at once otherwise. Of
    several the one with the lowest priority does, and of these the one with the most steps left.

    Args:
        denoises: jobs of this gateway.
        head: first of the queue, if there is one and no place for it.
        num_workers: denoises that are made at the same time.
    """
    on_device = [each for each in denoises if each.on_device]
    if len(on_device) < num_workers:
        return None
    waiting = [each.job for each in denoises if not each.on_device]
    if head is not None:
        waiting.append(head)
    able = [
        each
        for each in on_device
        if each.steps_left >= LEAST_STEPS_LEFT and any(_goes_before(job, each.job) for job in waiting)
    ]
    if not able:
        return None
    return min(able, key=lambda each: (each.job.submission.priority, -each.steps_left)).job.id


def _goes_before(job: Job, other: Job) -> bool:
    mine, theirs = job.submission.priority, other.submission.priority
    return mine > theirs and rank(job.create_time_s, mine) < rank(other.create_time_s, theirs)
