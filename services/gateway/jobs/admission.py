"""Who is next: priorities with ageing, fair shares of API keys, limits, positions. Pure.

Within a key jobs are begun by rank: a job of priority p counts as if it had come p * AGEING_S seconds earlier, so a
low one is overtaken only by what comes within that time, and none waits for ever. Between keys the one goes first whose
first job has the highest level: its priority, and one more for each AGEING_S that the key has waited since it was last
served. At the same level the key with fewer jobs under way goes first, then the one that was served longer ago.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gateway.auth.caller import NO_LIMITS, KeyLimits
from services.gateway.jobs.domain import HIGHEST_PRIORITY, LOWEST_PRIORITY

AGEING_S = 600.0
"""Waiting that counts as much as one level of priority."""
_DAY_S = 86_400
_LEVELS = range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)


class Limits(Protocol):
    """Where limits come from; asked for each creation and admission, so it answers from memory."""

    def of(self, key_id: str) -> KeyLimits:
        """The limits of a key; "" is who comes without one."""
        ...


class NoLimits:
    """Everybody may have everything."""

    def of(self, key_id: str) -> KeyLimits:
        """No limit."""
        return NO_LIMITS


@dataclass(frozen=True)
class KeyQueue:
    """The queue of one key, as far as admission looks at it."""

    key_id: str
    head_id: str
    """Of the job that is first within the key."""
    head_priority: int
    head_create_time_s: float
    running: int
    """Jobs of the key that are under way."""
    served_time_s: float
    """When one of its jobs was last begun; 0: never."""


def rank(create_time_s: float, priority: int) -> float:
    """Where a job stands within its key; lower goes first."""
    return create_time_s - priority * AGEING_S


def day_of(time_s: float) -> int:
    """The day of a daily limit, counted from 1970 in UTC."""
    return int(time_s // _DAY_S)


def seconds_to_next_day(time_s: float) -> float:
    """Until daily limits begin anew."""
    return (day_of(time_s) + 1) * _DAY_S - time_s


def next_head(queues: Iterable[KeyQueue], limits: Limits, now_s: float) -> KeyQueue | None:
    """The queue whose first job is begun next; None if nothing waits that may be begun."""
    allowed = []
    for queue in queues:
        most = limits.of(queue.key_id).max_concurrent_jobs
        if most is None or queue.running < most:
            allowed.append(queue)
    return min(allowed, key=lambda queue: _turn(queue, now_s), default=None)


def _turn(queue: KeyQueue, now_s: float) -> tuple[int, int, float, float]:
    waited_s = max(0.0, now_s - max(queue.head_create_time_s, queue.served_time_s))
    level = queue.head_priority + int(waited_s / AGEING_S)
    return -level, queue.running, queue.served_time_s, queue.head_create_time_s


class QueueSnapshot:
    """All jobs that wait, at one moment; tells how many are begun before one of them."""

    def __init__(self, by_key: Mapping[str, Sequence[tuple[float, int]]], num_by_class: Mapping[str, int]) -> None:
        """
        Args:
            by_key: rank and priority of every job of a key, in order of rank.
            num_by_class: how many jobs of each cost class wait.
        """
        self.num_by_class = num_by_class
        self.total = sum(map(len, by_key.values()))
        self._ranks = {key: array("d", [job_rank for job_rank, _ in jobs]) for key, jobs in by_key.items()}
        self._places = {key: _places(priority for _, priority in jobs) for key, jobs in by_key.items()}
        self._numbers = [[len(of_key.get(level, ())) for of_key in self._places.values()] for level in _LEVELS]
        """Of jobs of each priority, key by key, least first."""
        for numbers in self._numbers:
            numbers.sort()
        self._sums = [[0, *itertools.accumulate(numbers)] for numbers in self._numbers]

    def position(self, key_id: str, job_rank: float, priority: int) -> int:
        """How many jobs are begun before this one if nothing else comes.

        Exact with one key. With several, those of a higher priority go first, and at the same priority each key has as
        many turns as this one needs.
        """
        before = bisect.bisect_left(self._ranks.get(key_id, ()), job_rank)
        own = self._places.get(key_id, {})
        turns = bisect.bisect_left(own.get(priority, ()), before)
        higher = range(priority + 1, HIGHEST_PRIORITY + 1)
        of_all = sum(self._sums[level][-1] for level in higher) + self._turns_of_all(priority, turns)
        of_own = sum(len(own.get(level, ())) for level in higher) + min(turns, len(own.get(priority, ())))
        return before + of_all - of_own

    def _turns_of_all(self, priority: int, turns: int) -> int:
        """Jobs of a priority of all keys, at most so many of each."""
        numbers = self._numbers[priority]
        fewer = bisect.bisect_right(numbers, turns)
        return self._sums[priority][fewer] + turns * (len(numbers) - fewer)


def _places(priorities: Iterable[int]) -> dict[int, array[int]]:
    """Where in a queue the jobs of each priority are, in order."""
    places: dict[int, array[int]] = {}
    for place, priority in enumerate(priorities):
        places.setdefault(priority, array("Q")).append(place)
    return places
