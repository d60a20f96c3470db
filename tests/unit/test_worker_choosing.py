"""Which worker gets a call, by what is known of each."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from services.gateway.workers.choosing import (
    ANYTHING,
    LONGEST_PAUSE_S,
    Report,
    Standing,
    Wish,
    WorkerState,
    choose,
    job_slots,
    pause_s,
)
from shared.memory.modes import VramMode

SMALL, LARGE = "720x720_5s", "960x960_10s"
SERVING = Standing(WorkerState.SERVING)


def loaded(model: str, mode: VramMode = VramMode.STANDARD, **fields: object) -> Standing:
    report = Report("fusion", (SMALL, LARGE), model, mode, mode=VramMode.STANDARD)
    return replace(SERVING, report=report, **fields)


def test_the_one_with_the_least_work_is_taken_and_idle_ones_take_turns():
    assert choose([replace(SERVING, num_pending=n) for n in (2, 0, 1)]) == 1
    assert choose([replace(SERVING, num_given=n) for n in (2, 3, 1)]) == 2
    assert choose([Standing(WorkerState.UNKNOWN, num_given=1), SERVING]) == 1
    assert choose([Standing(WorkerState.UNKNOWN), SERVING]) == 0, "who was not asked yet is hoped for"
    assert choose([]) is None


def test_what_is_loaded_decides_between_equally_busy_ones_alone():
    standings = [loaded(SMALL), loaded(LARGE)]
    assert choose(standings, Wish(LARGE)) == 1 and choose(standings, Wish(SMALL)) == 0
    standings = [loaded(SMALL, num_given=9), loaded(LARGE)]
    assert choose(standings, Wish(SMALL)) == 0, "rather than the one that was given less"
    standings = [loaded(SMALL, num_pending=1), loaded(LARGE)]
    assert choose(standings, Wish(SMALL)) == 1, "switching is sooner done than somebody else's run"


def test_the_mode_counts_as_the_variant_does():
    standings = [loaded(SMALL), loaded(SMALL, VramMode.FP8)]
    assert choose(standings, Wish(SMALL, VramMode.FP8)) == 1
    assert choose(standings, Wish(SMALL)) == 0, "the mode of work that names none is standard at both"
    assert choose([SERVING, loaded(SMALL)], Wish(SMALL)) == 1, "one that has told nothing may have to switch"


def test_only_those_that_have_the_variant_are_asked():
    other = replace(SERVING, report=Report("fusion", (LARGE,)))
    busy = loaded(SMALL, num_pending=5)
    assert choose([other, busy], Wish(SMALL)) == 1
    assert choose([other], Wish(SMALL)) is None
    assert choose([other], Wish(LARGE)) == choose([other], ANYTHING) == 0
    vae = replace(SERVING, report=Report("vae"))
    assert choose([vae], Wish(SMALL)) == 0, "a stage without variants"


def test_the_order_of_what_speaks_against_a_worker():
    worst_first = [
        replace(SERVING, was_tried=True),
        Standing(WorkerState.UNREACHABLE),
        Standing(WorkerState.NOT_SERVING),
        replace(SERVING, lacked_memory=True),
        replace(SERVING, is_passed_over=True),
        replace(SERVING, num_pending=100),
        loaded(LARGE),
        loaded(SMALL),
    ]
    for worse, better in itertools.combinations(range(len(worst_first)), 2):
        pair = [worst_first[worse], worst_first[better]]
        assert choose(pair, Wish(SMALL)) == 1 and choose(pair[::-1], Wish(SMALL)) == 0, (worse, better)


def test_back_off_doubles_up_to_a_limit():
    assert [pause_s(n) for n in range(5)] == [0, 1, 2, 4, 8]
    assert pause_s(1000) == LONGEST_PAUSE_S


@pytest.mark.parametrize(
    ("fixed", "workers", "gateways", "slots"),
    [(0, 1, 1, 3), (0, 4, 1, 6), (0, 4, 2, 4), (0, 5, 2, 5), (0, 1, 3, 3), (7, 1, 1, 7), (0, 0, 1, 0), (7, 0, 1, 0)],
)
def test_jobs_at_once_follow_the_workers(fixed, workers, gateways, slots):
    assert job_slots(fixed, workers, gateways) == slots
