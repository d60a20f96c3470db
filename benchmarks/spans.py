"""Arithmetic of spans of time: what they cover together."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[float, float]
"""Begin and end in one unit of time."""


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans that do not touch, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def covered(spans: Iterable[Span]) -> float:
    """Time within at least one of the spans."""
    return sum(end - begin for begin, end in merge(spans))


def overlapped(groups: Iterable[Iterable[Span]]) -> float:
    """Time saved by doing things at once: what each group covers, added up, less what they cover together."""
    merged = [merge(group) for group in groups]
    return sum(map(covered, merged)) - covered(span for group in merged for span in group)
