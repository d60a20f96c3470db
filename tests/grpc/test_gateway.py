"""The gateway's API over scripted stages: the way of a job, errors, listing, files, HTTP."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ovi.common.v1 import generation_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import CheckpointError, InvalidRequest, ReferenceLost, ResourceExhausted
from tests.grpc.gateway_client import GatewayUnderTest, running_gateway, violations_of
from tests.grpc.scripted_stages import (
    MODEL,
    NUM_FRAMES,
    ScriptedStages,
    clip_of,
    latents_of,
    rows_of,
    scripted_stages,
)


@pytest.fixture(scope="module")
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        yield stages


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gateway") / "data"


@pytest.fixture(scope="module")
def gateway(stages, data_dir) -> Iterator[GatewayUnderTest]:
    with running_gateway(data_dir, *stages.flags) as gateway:
        yield gateway


@pytest.fixture
def by_hand(stages) -> Iterator[ScriptedStages]:
    """The fusion service does a step only when the test says so."""
    stages.fusion.automatic = False
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    yield stages
    stages.fusion.automatic = True


def test_a_prompt_becomes_a_clip(gateway, stages, data_dir):
    calls_before = len(stages.text_encoder.requests)
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    job = gateway.create(prompt="  a \n lighthouse  ", seed=11, steps=3)
    assert job.parameters.prompt == "a lighthouse"
    assert job.parameters.model == MODEL and (job.parameters.height, job.parameters.width) == (64, 64)
    assert job.parameters.options.slg_layer == 11 and job.parameters.options.video_guidance_scale == 4.0
    states = list(gateway.watch(job.id))
    fractions = [state.progress.fraction for state in states]
    assert fractions == sorted(fractions)
    steps = {state.progress.done for state in states if state.progress.stage == pb.JOB_STAGE_DENOISE}
    assert steps == {0, 1, 2, 3}, "a change for every step"
    end = states[-1]
    assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 1 and end.progress.fraction == 1.0
    assert set(end.stage_seconds) == {"encode_prompt", "denoise", "decode"}
    assert end.create_time.ToNanoseconds() <= end.start_time.ToNanoseconds() <= end.end_time.ToNanoseconds()

    encoded = stages.text_encoder.requests[calls_before]
    assert list(encoded.prompts) == [
        "a lighthouse",
        "jitter, bad hands, blur, distortion",
        "robotic, muffled, echo, distorted",
    ]
    assert encoded.num_pinned == 2 and encoded.prompt_format == generation_pb2.PROMPT_FORMAT_AUDCAP_TAGS
    call = stages.fusion.next_call()
    for name, text in zip(("prompt", "video_negative", "audio_negative"), encoded.prompts, strict=True):
        torch.testing.assert_close(call.inputs[name], rows_of(text), rtol=0, atol=0)
    assert gateway.download(job.id) == clip_of(11)
    assert (end.video.num_bytes, end.video.num_frames, end.video.fps) == (len(clip_of(11)), NUM_FRAMES, 24)

    with safe_open(data_dir / "artifacts" / job.id / "latents.safetensors", framework="pt") as kept:
        for name, expected in zip(("video_latent", "audio_latent"), latents_of(11), strict=True):
            torch.testing.assert_close(kept.get_tensor(name), expected, rtol=0, atol=0)
        assert kept.metadata()["seed"] == "11" and kept.metadata()["model_fingerprint"] == "0123456789abcdef"
    provenance = stages.vae.decodes[-1].provenance
    assert provenance["prompt"] == "a lighthouse" and provenance["seed"] == "11" and provenance["model"] == MODEL
    assert json.loads(provenance["settings"])["solver"] == "unipc"
    assert len(stages.fusion.producer.store) == 0, "both leases of the latents were given back"
    assert len(stages.text_encoder.producer.store) == 0


def test_reused_steps_are_told_by_the_job_and_by_the_clip(gateway, stages):
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    job = gateway.create(steps=5, step_cache_threshold=0.25)
    end = gateway.end_of(job.id)
    assert stages.fusion.next_call().request.options.step_cache_threshold == 0.25
    assert end.parameters.options.step_cache_threshold == 0.25 and end.video.steps_reused == 3
    provenance = stages.vae.decodes[-1].provenance
    assert provenance["steps_reused"] == "3"
    assert json.loads(provenance["settings"])["step_cache_threshold"] == "0.25"


def test_every_change_reaches_a_watcher_who_comes_late(gateway, by_hand):
    job = gateway.create(steps=3)
    call = by_hand.fusion.next_call()
    call.step()
    call.step()
    gateway.until(job.id, lambda now: now.progress.done == 2)
    watch = gateway.watch(job.id)
    assert next(watch).progress.done == 2, "the current state comes first"
    call.finish()
    assert list(watch)[-1].state == pb.JOB_STATE_COMPLETED
    assert len(list(gateway.watch(job.id))) == 1, "a watch of an ended job ends at once"


def test_picture_goes_through_the_vae_into_the_denoise(gateway, stages):
    while not stages.fusion.calls.empty():
        stages.fusion.calls.get()
    file = io.BytesIO()
    Image.new("RGB", (128, 32), "red").save(file, "PNG")
    uploaded = gateway.upload(file.getvalue(), chunk_bytes=40)
    assert (uploaded.size.height, uploaded.size.width) == (32, 128)
    assert gateway.upload(file.getvalue()).image_id == uploaded.image_id, "the same bytes are kept once"
    job = gateway.create(image_id=uploaded.image_id)
    assert (job.parameters.height, job.parameters.width) == (32, 128), "the picture's aspect at the model's area"
    assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
    assert stages.vae.pictures[-1] == (32, 128, file.getvalue())
    call = stages.fusion.next_call()
    torch.testing.assert_close(call.inputs["first_frame_latent"], torch.full((48, 1, 2, 8), 0.5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no bytes"),
        (b"GIF89a" + bytes(100), "PNG, JPEG and WebP"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged"),
        (bytes(33 << 20), "together"),
    ],
)
def test_upload_refuses_what_is_no_picture(gateway, data, said):
    with pytest.raises(grpc.RpcError) as refused:
        gateway.upload(data)
    assert said in violations_of(refused.value)["chunk"]


def test_a_request_id_makes_one_job(gateway):
    first = gateway.create(request_id="once", seed=3)
    assert gateway.create(request_id="once", seed=3).id == first.id
    with pytest.raises(grpc.RpcError) as refused:
        gateway.create(request_id="once", seed=4)
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS and "request_id 'once'" in refused.value.details()
    assert gateway.end_of(first.id).state == pb.JOB_STATE_COMPLETED
    assert gateway.create(request_id="once", seed=3).state == pb.JOB_STATE_COMPLETED


def test_everything_wrong_is_said_at_once(gateway):
    options = generation_pb2.SamplingOptions(num_inference_steps=0, video_guidance_scale=float("nan"), seed=-1)
    wanted = pb.GenerationParameters(
        prompt=" ", model="nonesuch", height=64, options=options, image_id="../../etc/passwd"
    )
    with pytest.raises(grpc.RpcError) as refused:
        gateway.jobs.CreateJob(pb.CreateJobRequest(request_id="a b", parameters=wanted), timeout=30)
    said = violations_of(refused.value)
    assert set(said) == {
        "request_id",
        "parameters.prompt",
        "parameters.model",
        "parameters.width",
        "parameters.image_id",
        "parameters.options.num_inference_steps",
        "parameters.options.video_guidance_scale",
        "parameters.options.seed",
    }
    assert MODEL in said["parameters.model"] and "960x960_5s" not in said["parameters.model"]


@pytest.mark.parametrize("job_id", ["", "../../etc/passwd", "job_", "job_" + "I" * 26, "job_" + "0" * 26 + "/"])
def test_ids_that_are_none_reach_nothing(gateway, job_id):
    for call, request in (
        (gateway.jobs.GetJob, pb.GetJobRequest(id=job_id)),
        (gateway.jobs.CancelJob, pb.CancelJobRequest(id=job_id)),
        (gateway.jobs.DeleteJob, pb.DeleteJobRequest(id=job_id)),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=30)
        assert "id" in violations_of(refused.value)
    for stream in (
        gateway.jobs.WatchJob(pb.WatchJobRequest(id=job_id), timeout=30),
        gateway.jobs.DownloadVideo(pb.DownloadVideoRequest(id=job_id), timeout=30),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            next(stream)
        assert "id" in violations_of(refused.value)


def test_unknown_job_is_not_found(gateway):
    unknown = "job_" + "0" * 26
    for call in (gateway.get, gateway.cancel, gateway.delete, gateway.download, gateway.end_of):
        with pytest.raises(grpc.RpcError) as refused:
            call(unknown)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InvalidRequest.of("prompt", "has the wrong shape"), "INVALID_ARGUMENT", "prompt: has the wrong shape"),
        (CheckpointError("/c/model.safetensors: truncated"), "FAILED_PRECONDITION", "model.safetensors: truncated"),
    ],
)
def test_what_a_worker_refuses_fails_the_job_with_its_words(gateway, by_hand, error, code, said):
    job = gateway.create()
    call = by_hand.fusion.next_call()
    call.step()
    call.fail(error)
    end = gateway.end_of(job.id)
    assert end.state == pb.JOB_STATE_FAILED and end.error.code == code and said in end.error.message
    with pytest.raises(grpc.RpcError) as refused:
        gateway.download(job.id)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION and "failed" in refused.value.details()


def test_a_full_worker_is_waited_for(gateway, stages):
    stages.fusion.refusals.put(ResourceExhausted("the fusion queue is full (16 of 16)"))
    stages.fusion.refusals.put(ResourceExhausted("the fusion queue is full (16 of 16)"))
    job = gateway.create()
    end = gateway.end_of(job.id)
    assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 1 and stages.fusion.refusals.empty()


def test_lost_embeddings_are_made_again(gateway, by_hand):
    encodes = len(by_hand.text_encoder.requests)
    job = gateway.create(seed=21)
    call = by_hand.fusion.next_call()
    call.step()
    call.fail(ReferenceLost("tensor 'x' is not held here"))
    by_hand.fusion.next_call().finish()
    assert gateway.end_of(job.id).state == pb.JOB_STATE_COMPLETED
    assert len(by_hand.text_encoder.requests) == encodes + 2
    assert gateway.download(job.id) == clip_of(21)


def test_a_damaged_clip_is_no_clip(gateway, stages, data_dir):
    stages.vae.damage = True
    try:
        job = gateway.create()
        end = gateway.end_of(job.id)
    finally:
        stages.vae.damage = False
    assert end.state == pb.JOB_STATE_FAILED and end.error.code == "DATA_LOSS" and "checksum" in end.error.message
    assert [path.name for path in (data_dir / "artifacts" / job.id).iterdir()] == ["latents.safetensors"]


def test_cancel_stops_the_worker_before_its_next_step(gateway, by_hand, data_dir):
    job = gateway.create(steps=50)
    call = by_hand.fusion.next_call()
    call.step()
    gateway.until(job.id, lambda now: now.progress.done == 1)
    watch = gateway.watch(job.id)
    assert next(watch).state == pb.JOB_STATE_RUNNING
    assert gateway.cancel(job.id).state == pb.JOB_STATE_CANCELLED
    assert call.ended.wait(10), "the call was cancelled without another step being asked of it"
    assert list(watch)[-1].state == pb.JOB_STATE_CANCELLED
    assert gateway.cancel(job.id).state == pb.JOB_STATE_CANCELLED
    assert not (data_dir / "artifacts" / job.id).exists()


def test_a_cancelled_job_in_the_queue_never_runs(gateway, by_hand):
    running = [gateway.create() for _ in range(3)]
    calls = [by_hand.fusion.next_call() for _ in running]
    waiting = gateway.create(seed=99)
    assert gateway.get(waiting.id).state == pb.JOB_STATE_QUEUED, "three jobs at a time"
    assert gateway.cancel(waiting.id).state == pb.JOB_STATE_CANCELLED
    after = gateway.create(seed=98)
    for call in calls:
        call.finish()
    last = by_hand.fusion.next_call()
    assert last.request.options.seed == 98, "the cancelled job was passed over"
    last.finish()
    assert {gateway.end_of(job.id).state for job in (*running, after)} == {pb.JOB_STATE_COMPLETED}
    end = gateway.get(waiting.id)
    assert end.state == pb.JOB_STATE_CANCELLED and end.attempts == 0 and not end.HasField("start_time")


def test_cancel_leaves_an_ended_job_as_it_is(gateway):
    job = gateway.create(seed=5)
    gateway.end_of(job.id)
    assert gateway.cancel(job.id).state == pb.JOB_STATE_COMPLETED
    assert gateway.download(job.id) == clip_of(5)


def test_cancel_and_completion_race_to_one_end(gateway, stages, data_dir):
    delays = random.Random(1)

    def race(seed: int) -> pb.Job:
        job = gateway.create(seed=seed, steps=1)
        if delays.random() < 0.7:
            gateway.until(job.id, lambda now: now.progress.fraction > delays.random() or now.state >= 3)
        answered = gateway.cancel(job.id)
        end = gateway.end_of(job.id)
        assert answered.state == end.state == gateway.get(job.id).state, "the state that was told is the last"
        return end

    with ThreadPoolExecutor(6) as threads:
        ends = list(threads.map(race, range(40)))
    for seed, end in enumerate(ends):
        if end.state == pb.JOB_STATE_COMPLETED:
            assert gateway.download(end.id) == clip_of(seed)
        else:
            assert end.state == pb.JOB_STATE_CANCELLED and not end.HasField("video")
            assert not (data_dir / "artifacts" / end.id).exists()
    assert pb.JOB_STATE_CANCELLED in {end.state for end in ends}


def test_cancel_while_decoding(gateway, stages, data_dir):
    stages.vae.allowed.clear()
    try:
        job = gateway.create()
        gateway.until(job.id, lambda now: now.progress.stage == pb.JOB_STAGE_DECODE and now.progress.done == 60)
        assert gateway.cancel(job.id).state == pb.JOB_STATE_CANCELLED
    finally:
        stages.vae.allowed.set()
    assert not (data_dir / "artifacts" / job.id).exists()


def test_delete_takes_the_files_and_only_of_ended_jobs(gateway, by_hand, data_dir):
    job = gateway.create(request_id="deleted")
    call = by_hand.fusion.next_call()
    with pytest.raises(grpc.RpcError) as refused:
        gateway.delete(job.id)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION and "cancel it" in refused.value.details()
    call.finish()
    gateway.end_of(job.id)
    assert (data_dir / "artifacts" / job.id / "video.mp4").is_file()
    gateway.delete(job.id)
    assert not (data_dir / "artifacts" / job.id).exists()
    with pytest.raises(grpc.RpcError) as refused:
        gateway.get(job.id)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    again = gateway.create(request_id="deleted", seed=8)
    by_hand.fusion.next_call().finish()
    assert again.id != job.id and gateway.end_of(again.id).state == pb.JOB_STATE_COMPLETED


def test_list_pages_and_filters(gateway):
    ids = [gateway.create(seed=seed).id for seed in range(5)]
    for job_id in ids:
        gateway.end_of(job_id)
    seen: list[str] = []
    token = ""
    while len(seen) < 5:
        page = gateway.jobs.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token), timeout=30)
        assert len(page.jobs) == 2
        seen += [job.id for job in page.jobs]
        token = page.next_page_token
    assert seen[:5] == ids[::-1], "newest first"
    cancelled = gateway.jobs.ListJobs(pb.ListJobsRequest(states=[pb.JOB_STATE_CANCELLED]), timeout=30).jobs
    assert all(job.state == pb.JOB_STATE_CANCELLED for job in cancelled)
    for request in (
        pb.ListJobsRequest(page_token="nonsense"),
        pb.ListJobsRequest(page_token=token, states=[pb.JOB_STATE_FAILED]),
        pb.ListJobsRequest(page_size=1001),
        pb.ListJobsRequest(states=[77]),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            gateway.jobs.ListJobs(request, timeout=30)
        assert violations_of(refused.value)


def test_models_are_those_that_can_be_run(gateway):
    models = gateway.models.ListModels(pb.ListModelsRequest(), timeout=30).models
    assert [(model.id, model.num_frames, model.device) for model in models] == [(MODEL, NUM_FRAMES, "script")]


def test_http_side(gateway, stages):
    job = gateway.create(seed=31)
    gateway.end_of(job.id)
    with httpx.Client(base_url=gateway.http_url, timeout=30) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").status_code == 200
        health = http.get("/api/health").json()
        assert health["engine_loaded"] is True and health["queue_size"] == 0 and health["total_jobs"] >= 1
        whole = http.get(f"/api/videos/{job.id}.mp4")
        assert whole.content == clip_of(31) and whole.headers["content-type"] == "video/mp4"
        part = http.get(f"/api/videos/{job.id}.mp4", headers={"Range": "bytes=100-199"})
        assert part.status_code == 206 and part.content == clip_of(31)[100:200]
        for name in ("x.mp4", "job_" + "0" * 26 + ".mp4", job.id, "..%2f..%2fetc%2fpasswd"):
            missing = http.get(f"/api/videos/{name}")
            assert missing.status_code == 404 and missing.json()["detail"]
        metrics = http.get("/metrics").text
        assert 'ovi_stage_seconds_count{stage="denoise"}' in metrics and "ovi_queue_length 0.0" in metrics
        stages.vae.stop()
        try:
            lacking = http.get("/readyz")
            assert lacking.status_code == 503 and lacking.json()["services"]["vae"] == "UNREACHABLE"
            assert "vae" in lacking.json()["detail"]
        finally:
            stages.vae.start()
