"""Two gateways on one PostgreSQL: each answers for every job, and each takes over what the other leaves behind."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.grpc.gateway_client import ENDED, WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import DenoiseCall, ScriptedStages, clip_of, scripted_stages
from tests.postgres import PostgresUnderTest, running_postgres

LEASE_S = 4


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresUnderTest]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        yield stages


@contextlib.contextmanager
def pair(data_dir: Path, stages: ScriptedStages, url: str) -> Iterator[list[GatewayUnderTest]]:
    """Two gateways, one job each at a time."""
    flags = ["--database-url", url, "--lease-s", str(LEASE_S), "--max-concurrent-jobs", "1", *stages.flags]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running_gateway(data_dir, *flags)) for _ in range(2)]


def calls_by_seed(stages: ScriptedStages, number: int) -> dict[int, DenoiseCall]:
    calls = [stages.fusion.next_call() for _ in range(number)]
    return {call.request.options.seed: call for call in calls}


def test_every_gateway_answers_for_every_job(stages, postgres, tmp_path):
    with pair(tmp_path, stages, postgres.new_database()) as (first, second):
        jobs = {seed: first.create(seed=seed) for seed in (1, 2, 3)}
        calls = calls_by_seed(stages, 2)
        assert set(calls) == {1, 2}, "each gateway has taken one, in order"
        for gateway in (first, second):
            assert gateway.get(jobs[3].id).state == pb.JOB_STATE_QUEUED
            for seed in (1, 2):
                watch = gateway.watch(jobs[seed].id)
                next(watch)
                calls[seed].step()
                done = next(job.progress.done for job in watch if job.progress.done)
                assert done >= 1, "steps are told on both"
                watch.close()
        # One of the two is worked on by the other gateway, which has to hear of it.
        for seed in (1, 2):
            assert first.cancel(jobs[seed].id).state == pb.JOB_STATE_CANCELLED
            assert calls[seed].ended.wait(WAIT_S), "the work stops"
        stages.fusion.next_call().finish()
        for gateway in (first, second):
            assert gateway.end_of(jobs[3].id).state == pb.JOB_STATE_COMPLETED
            assert gateway.download(jobs[3].id) == clip_of(3)
            listed = gateway.jobs.ListJobs(pb.ListJobsRequest(), timeout=WAIT_S).jobs
            assert [job.id for job in listed] == [jobs[3].id, jobs[2].id, jobs[1].id]
        files = {path.parent.name for path in (tmp_path / "artifacts").glob("*/*")}
        assert files == {jobs[3].id}, "cancelled jobs leave nothing"


def ends_of(gateway: GatewayUnderTest, stages: ScriptedStages, jobs: dict[int, pb.Job]) -> dict[int, pb.Job]:
    """The last states of some jobs; whatever is denoised again meanwhile is finished at once."""
    ends: dict[int, pb.Job] = {}
    while len(ends) < len(jobs):
        with contextlib.suppress(queue.Empty):
            stages.fusion.calls.get(timeout=0.2).finish()
        for seed, job in jobs.items():
            with contextlib.suppress(grpc.RpcError):
                now = gateway.get(job.id)
                if now.state in ENDED:
                    ends[seed] = now
    return ends


def test_jobs_of_a_killed_gateway_go_on_in_the_other(stages, postgres, tmp_path):
    with pair(tmp_path, stages, postgres.new_database()) as (first, second):
        jobs = {seed: second.create(seed=seed) for seed in (11, 12)}
        calls = calls_by_seed(stages, 2)
        first.service.process.kill()
        assert first.service.process.wait(WAIT_S) == -signal.SIGKILL
        for call in calls.values():
            call.finish()
        ends = ends_of(second, stages, jobs)
        assert {end.state for end in ends.values()} == {pb.JOB_STATE_COMPLETED}
        assert sorted(end.attempts for end in ends.values())[-1] >= 2
        assert "was lost" in max(ends.values(), key=lambda end: end.attempts).setbacks[0].reason
        assert all(second.download(jobs[seed].id) == clip_of(seed) for seed in jobs)
    assert len(stages.text_encoder.requests) == 2, "a finished stage is not repeated"


def test_a_gateway_that_was_stopped_for_a_while_does_no_harm_when_it_comes_back(stages, postgres, tmp_path):
    with pair(tmp_path, stages, postgres.new_database()) as (first, second):
        jobs = {seed: second.create(seed=seed) for seed in (21, 22)}
        calls = calls_by_seed(stages, 2)
        first.service.process.send_signal(signal.SIGSTOP)
        # What its call makes meanwhile waits in its connection.
        for call in calls.values():
            call.finish()
        ends = ends_of(second, stages, jobs)
        first.service.process.send_signal(signal.SIGCONT)
        after = {23: first.create(seed=23)}
        assert ends_of(first, stages, after)[23].state == pb.JOB_STATE_COMPLETED
        assert {end.state for end in ends.values()} == {pb.JOB_STATE_COMPLETED}
        for seed, job in jobs.items():
            assert first.get(job.id) == second.get(job.id) == ends[seed], "the first end stands"
            assert first.download(job.id) == clip_of(seed)


def test_a_database_that_is_stopped_hard_loses_nothing(stages, postgres, tmp_path):
    with pair(tmp_path, stages, postgres.new_database()) as (first, second):
        jobs = {seed: first.create(seed=seed) for seed in (31, 32, 33)}
        calls = calls_by_seed(stages, 2)
        postgres.stop_hard()
        try:
            calls[31].step()
        finally:
            postgres.start()
        for call in calls.values():
            call.finish()
        ends = ends_of(second, stages, jobs)
        assert {end.state for end in ends.values()} == {pb.JOB_STATE_COMPLETED}, ends
        assert all(first.download(jobs[seed].id) == clip_of(seed) for seed in jobs)
