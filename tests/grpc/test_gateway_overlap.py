"""Stages of different jobs run at the same time: the next is encoded and the last decoded while one is denoised."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from tests.grpc.gateway_client import running_gateway
from tests.grpc.scripted_stages import WAIT_S, ScriptedStages, clip_of, scripted_stages


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        stages.vae.allowed.clear()
        yield stages
        stages.vae.allowed.set()


def test_three_jobs_are_in_three_stages_at_once(stages, tmp_path) -> None:
    with running_gateway(tmp_path / "data", *stages.flags) as gateway:
        last, now, following = (gateway.create(prompt=f"clip {seed}", seed=seed) for seed in (1, 2, 3))
        calls = {call.request.options.seed: call for call in (stages.fusion.next_call() for _ in range(3))}
        encoded = {request.prompts[0] for request in stages.text_encoder.requests}
        assert encoded == {"clip 1", "clip 2", "clip 3"}, "the third was encoded though nothing has been denoised"
        calls[1].finish()
        gateway.until(last.id, lambda job: job.progress.stage == pb.JOB_STAGE_DECODE and job.progress.done == 60)
        calls[2].step()
        gateway.until(now.id, lambda job: job.progress.stage == pb.JOB_STAGE_DENOISE and job.progress.done == 1)
        assert not calls[3].ended.is_set(), "the third waits at fusion, its prompt encoded"
        assert gateway.get(last.id).progress.stage == pb.JOB_STAGE_DECODE, "the first is still being decoded"
        stages.vae.allowed.set()
        calls[2].finish()
        calls[3].finish()
        for job, seed in ((last, 1), (now, 2), (following, 3)):
            assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
            assert gateway.download(job.id) == clip_of(seed), "no job got another's latents"


def test_a_fourth_job_waits_for_a_place(stages, tmp_path) -> None:
    stages.vae.allowed.set()
    with running_gateway(tmp_path / "data", *stages.flags) as gateway:
        jobs = [gateway.create(prompt=f"clip {seed}", seed=seed) for seed in range(4)]
        calls = [stages.fusion.next_call() for _ in range(3)]
        waiting = {job.id for job in jobs if gateway.get(job.id).state == pb.JOB_STATE_QUEUED}
        assert len(waiting) == 1
        for call in calls:
            call.finish()
        stages.fusion.next_call().finish()
        assert all(gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED for job in jobs)
        assert all(call.ended.wait(WAIT_S) for call in calls)
