"""Token buckets: so many calls a minute, as a burst or evenly. In memory, so each replica counts for itself."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import RateLimited

MAX_BUCKETS = 20_000
"""Kept at once; those that were not used for longest are forgotten, which fills them."""


@dataclass
class _Bucket:
    tokens: float
    time_s: float


class Buckets:
    """A bucket for each of many names. Used from one thread."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            what: is limited, for errors.
            clock: seconds; tests put their own in.
        """
        self._what = what
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, name: str, per_minute: int) -> None:
        """Count one call.

        Args:
            name: whose.
            per_minute: size of the bucket, which fills up in a minute; 0: no limit.

        Raises:
            RateLimited: it is empty; says when there is a token again.
        """
        wait_s = self._wait_s(name, per_minute)
        if wait_s > 0:
            raise RateLimited(
                f"more than {per_minute} {self._what} a minute; try again in {math.ceil(wait_s)} s", wait_s
            )
        if per_minute:
            self._buckets[name].tokens -= 1

    def _wait_s(self, name: str, per_minute: int) -> float:
        if not per_minute:
            return 0.0
        now_s = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(per_minute, now_s)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(name)
        rate = per_minute / 60
        bucket.tokens = min(per_minute, bucket.tokens + (now_s - bucket.time_s) * rate)
        bucket.time_s = now_s
        return 0.0 if bucket.tokens >= 1 else (1 - bucket.tokens) / rate
