"""The queue over the wire: batches, priorities, deadlines, positions, filters, pauses, retention."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from ovi.common.v1 import generation_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway, violations_of
from tests.grpc.scripted_stages import ScriptedStages, scripted_stages


@pytest.fixture(scope="module")
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        yield stages


@pytest.fixture(scope="module")
def gateway(stages, tmp_path_factory) -> Iterator[GatewayUnderTest]:
    """Works on one job at a time."""
    with running_gateway(tmp_path_factory.mktemp("queue"), "--max-concurrent-jobs", "1", *stages.flags) as gateway:
        yield gateway


@pytest.fixture
def busy(gateway, stages) -> Iterator[None]:
    """The one place is taken; what a test leaves in the queue is cancelled."""
    gateway.create(seed=1)
    stages.fusion.next_call()
    yield
    unfinished = [pb.JOB_STATE_PAUSED, pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING]
    for job in gateway.jobs.ListJobs(pb.ListJobsRequest(states=unfinished, page_size=1000), timeout=WAIT_S).jobs:
        gateway.cancel(job.id)
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()


def create(gateway: GatewayUnderTest, seed: int, **asked: object) -> pb.Job:
    options = generation_pb2.SamplingOptions(num_inference_steps=3, seed=seed)
    parameters = pb.GenerationParameters(prompt="a lighthouse", options=options)
    return gateway.jobs.CreateJob(pb.CreateJobRequest(parameters=parameters, **asked), timeout=WAIT_S).job


def listed(gateway: GatewayUnderTest, **asked: object) -> list[str]:
    return [job.id for job in gateway.jobs.ListJobs(pb.ListJobsRequest(**asked), timeout=WAIT_S).jobs]


def test_higher_priorities_are_begun_first_and_positions_say_so(gateway, stages, busy):
    jobs = {priority: create(gateway, 10 + priority, priority=priority) for priority in (2, 9, 5)}
    assert create(gateway, 99).priority == 5, "of those that say nothing"
    deadline_s = time.monotonic() + WAIT_S
    expected = {9: 0, 5: 1, 2: 3}
    while {priority: gateway.get(job.id).estimate.position for priority, job in jobs.items()} != expected:
        assert time.monotonic() < deadline_s, "positions are at most some seconds old"
    running = gateway.jobs.ListJobs(pb.ListJobsRequest(states=[pb.JOB_STATE_RUNNING]), timeout=WAIT_S).jobs[0]
    assert running.HasField("estimate") and running.estimate.position == 0
    gateway.cancel(running.id)
    order = []
    for _ in range(4):
        call = stages.fusion.next_call()
        order.append(call.request.options.seed)
        call.finish()
    assert order == [19, 15, 99, 12]
    again = create(gateway, 20)
    gateway.end_of(jobs[2].id)
    stages.fusion.next_call()
    stats = gateway.jobs.QueueStats(pb.QueueStatsRequest(), timeout=WAIT_S)
    assert stats.num_jobs["completed"] >= 4 and stats.num_jobs["running"] == 1
    while not gateway.get(again.id).estimate.HasField("end_time"):
        assert time.monotonic() < deadline_s, "what ended has told how long such jobs take"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"priority": 10}, "priority"),
        ({"deadline": Timestamp(seconds=1000)}, "deadline"),
        ({"label": "x" * 201}, "label"),
    ],
)
def test_what_cannot_be_queued_is_refused(gateway, asked, field):
    with pytest.raises(grpc.RpcError) as refused:
        create(gateway, 1, **asked)
    assert list(violations_of(refused.value)) == [field]


def test_a_job_past_its_deadline_never_runs(gateway, stages, busy):
    soon = Timestamp()
    soon.FromMilliseconds(int((time.time() + 1.5) * 1000))
    late = create(gateway, 30, deadline=soon)
    assert late.deadline == soon
    end = gateway.end_of(late.id)
    assert end.state == pb.JOB_STATE_FAILED and end.error.code == "DEADLINE_EXCEEDED" and end.attempts == 0
    assert stages.fusion.calls.empty()


def test_a_batch_is_queued_whole_once_and_found_by_its_id(gateway, busy):
    table = b"text_prompt\timage_path\na dog\t\na cat\t\n"
    template = pb.GenerationParameters(options=generation_pb2.SamplingOptions(num_inference_steps=3, seed=7))
    request = pb.BatchCreateRequest(
        request_id="batch", table=table, template=template, samples_per_prompt=2, priority=1, label="pets"
    )
    made = gateway.jobs.BatchCreate(request, timeout=WAIT_S)
    assert gateway.jobs.BatchCreate(request, timeout=WAIT_S) == made, "a repeated call makes nothing"
    jobs = [gateway.get(job_id) for job_id in made.job_ids]
    wanted = [(job.parameters.prompt, job.parameters.options.seed, job.priority) for job in jobs]
    assert wanted == [("a dog", 7, 1), ("a dog", 8, 1), ("a cat", 7, 1), ("a cat", 8, 1)]
    assert {job.batch_id for job in jobs} == {made.batch_id}
    assert listed(gateway, batch_id=made.batch_id) == made.job_ids[::-1]
    assert listed(gateway, label="pets", oldest_first=True, page_size=3) == made.job_ids[:3]
    assert listed(gateway, batch_id=made.batch_id, states=[pb.JOB_STATE_RUNNING]) == []
    request.table += b"a bird\t\n"
    with pytest.raises(grpc.RpcError) as refused:
        gateway.jobs.BatchCreate(request, timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


def test_one_wrong_row_refuses_a_batch_with_its_number(gateway):
    table = b"text_prompt,image_path\na dog,\n,\na cat,nothing\n"
    with pytest.raises(grpc.RpcError) as refused:
        gateway.jobs.BatchCreate(pb.BatchCreateRequest(table=table, label="none"), timeout=WAIT_S)
    assert list(violations_of(refused.value)) == ["table[1].prompt", "table[2].image_id"]
    assert listed(gateway, label="none") == [], "none was made"


def test_a_paused_job_is_passed_over_until_it_is_resumed(gateway, stages, busy):
    first, second = create(gateway, 40), create(gateway, 41)
    assert gateway.jobs.PauseJob(pb.PauseJobRequest(id=first.id), timeout=WAIT_S).job.state == pb.JOB_STATE_PAUSED
    gateway.cancel(listed(gateway, states=[pb.JOB_STATE_RUNNING])[0])
    call = stages.fusion.next_call()
    assert call.request.options.seed == 41
    third = create(gateway, 42)
    resumed = gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=first.id), timeout=WAIT_S).job
    assert resumed.state == pb.JOB_STATE_QUEUED
    call.finish()
    call = stages.fusion.next_call()
    assert call.request.options.seed == 40, "it has the place it had, before the third"
    call.finish()
    stages.fusion.next_call().finish()
    for job in (first, second, third):
        assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
    with pytest.raises(grpc.RpcError) as refused:
        gateway.jobs.ResumeJob(pb.ResumeJobRequest(id=first.id), timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION and "completed" in refused.value.details()
    with pytest.raises(grpc.RpcError) as refused:
        gateway.jobs.PauseJob(pb.PauseJobRequest(id=first.id), timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_ended_jobs_go_with_their_files_when_there_are_too_many(stages, tmp_path):
    with running_gateway(tmp_path, "--retention-jobs", "1", *stages.flags) as gateway:
        ends = []
        for seed in (51, 52):
            job = create(gateway, seed)
            stages.fusion.next_call().finish()
            ends.append(gateway.end_of(job.id))
        deadline_s = time.monotonic() + WAIT_S
        while listed(gateway) != [ends[1].id] or (tmp_path / "artifacts" / ends[0].id).exists():
            assert time.monotonic() < deadline_s, listed(gateway)
            time.sleep(0.1)
        assert len(gateway.download(ends[1].id)) > 0
