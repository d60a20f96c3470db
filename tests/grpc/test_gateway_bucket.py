"""Gateways whose files are in a bucket: they share no folder, and outlive it when the bucket is away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import grpc
import httpx
import pytest

from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import EXIT_BAD_CONFIG
from tests.bucket import BucketUnderTest, running_bucket
from tests.grpc.gateway_client import WAIT_S, GatewayUnderTest, running_gateway
from tests.grpc.scripted_stages import ScriptedStages, clip_of, scripted_stages, steps_of
from tests.http.clips import picture, tiny_clip
from tests.postgres import running_postgres


@pytest.fixture(scope="module")
def bucket() -> Iterator[BucketUnderTest]:
    with running_bucket() as bucket:
        yield bucket


@pytest.fixture
def stages() -> Iterator[ScriptedStages]:
    with scripted_stages() as stages:
        stages.fusion.automatic = False
        yield stages


@contextlib.contextmanager
def door_shut(bucket: BucketUnderTest) -> Iterator[None]:
    bucket.door.shut()
    try:
        yield
    finally:
        bucket.door.open()


def waited(gateway: GatewayUnderTest) -> bool:
    """Whether a job has waited for the artifact store."""
    lines = httpx.get(f"{gateway.http_url}/metrics", timeout=WAIT_S).text.splitlines()
    return any(line.startswith('ovi_stage_waits_total{stage="artifact store"}') for line in lines)


def test_a_job_of_a_killed_gateway_goes_on_in_one_that_shares_no_folder(stages, bucket, tmp_path):
    url, seed = bucket.new_url(), 41
    with running_postgres() as postgres, contextlib.ExitStack() as stack:
        flags = ["--database-url", postgres.new_database(), "--artifacts-url", url, "--lease-s", "2", *stages.flags]

        def start(name: str) -> GatewayUnderTest:
            return stack.enter_context(running_gateway(tmp_path / name, *flags))

        first = start("first")
        image_id = first.upload(picture()).image_id
        job = first.create(seed=seed, steps=6, image_id=image_id)
        call = stages.fusion.next_call()
        kept = threading.Event()
        call.step()
        call.step()
        call.keep(stages.fusion.checkpoint(2, on_end=kept.set))
        assert kept.wait(WAIT_S), "a checkpoint is given back when it is kept"
        second = start("second")
        # What only the other one was told is known here, too.
        later = second.create(seed=seed + 1, image_id=image_id)
        stages.fusion.next_call().finish()
        assert second.end_of(later.id).state == pb.JOB_STATE_COMPLETED
        first.service.process.kill()
        assert first.service.process.wait(WAIT_S) == -signal.SIGKILL
        call = stages.fusion.next_call()
        assert call.request.run_id == job.id and steps_of(call.inputs["checkpoint"]) == 2
        call.finish()
        end = second.end_of(job.id)
        assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 2
        assert [data for *_, data in stages.vae.pictures] == [picture(), picture()]
        third = start("third")
        clip, tags = clip_of(seed), set()
        for gateway in (second, third):
            assert gateway.download(job.id) == clip
            with httpx.Client(base_url=gateway.http_url, timeout=WAIT_S) as http:
                path = f"/v1/jobs/{job.id}/video"
                part = http.get(path, headers={"range": "bytes=1000000-1000009"})
                assert part.status_code == 206 and part.content == clip[1_000_000:1_000_010]
                assert part.headers["content-range"] == f"bytes 1000000-1000009/{len(clip)}"
                head = http.head(path)
                assert head.headers["content-length"] == str(len(clip)) and not head.content
                tags.add(head.headers["etag"])
                assert http.get(path, headers={"if-none-match": head.headers["etag"]}).status_code == 304
                stale = http.get(path, headers={"range": "bytes=0-9", "if-range": '"another"'})
                assert stale.status_code == 200 and stale.content == clip
                beyond = http.get(path, headers={"range": "bytes=99999999-"})
                assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{len(clip)}"
        assert len(tags) == 1, "every gateway tells the same"
        assert bucket.names(url, f"artifacts/{job.id}") == [
            f"artifacts/{job.id}/{name}" for name in ("latents.safetensors", "video.mp4")
        ]
        third.delete(job.id)
        assert not bucket.names(url, f"artifacts/{job.id}")
        assert not list(tmp_path.glob("*/artifacts")) + list(tmp_path.glob("*/images"))


def test_a_job_waits_for_a_bucket_that_is_away(stages, bucket, tmp_path):
    stages.vae.clip = tiny_clip()
    with running_gateway(tmp_path / "data", "--artifacts-url", bucket.new_url(), *stages.flags) as gateway:
        earlier = gateway.create(seed=1)
        stages.fusion.next_call().finish()
        assert gateway.end_of(earlier.id).state == pb.JOB_STATE_COMPLETED
        with httpx.Client(base_url=gateway.http_url, timeout=WAIT_S) as http:
            sheet = http.get(f"/v1/jobs/{earlier.id}/spritesheet")
            assert sheet.status_code == 200 and sheet.headers["content-type"] == "image/jpeg"
            assert http.get(f"/v1/jobs/{earlier.id}/spritesheet").content == sheet.content
            job = gateway.create(seed=2)
            call = stages.fusion.next_call()
            with door_shut(bucket):
                call.finish()
                for use in (lambda: gateway.download(earlier.id), lambda: gateway.upload(picture())):
                    with pytest.raises(grpc.RpcError, match=r"artifact store .* cannot be used now") as away:
                        use()
                    assert away.value.code() is grpc.StatusCode.UNAVAILABLE
                answer = http.get(f"/v1/jobs/{earlier.id}/video")
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "artifacts_unavailable"
                with pytest.raises(grpc.RpcError, match="artifact store"):
                    gateway.delete(earlier.id)
                while not waited(gateway):
                    assert gateway.get(job.id).state == pb.JOB_STATE_RUNNING
            end = gateway.end_of(job.id)
            assert end.state == pb.JOB_STATE_COMPLETED and end.attempts == 1 and stages.fusion.calls.empty()
            assert http.get(f"/v1/jobs/{job.id}/video").content == tiny_clip() == gateway.download(earlier.id)
    assert gateway.service.process.returncode == 0, "the library's threads let the process end"


def test_patience_with_a_bucket_is_bounded_and_nothing_is_lost_track_of(stages, bucket, tmp_path):
    url = bucket.new_url()
    flags = ["--artifacts-url", url, "--worker-wait-s", "1", *stages.flags]
    with running_gateway(tmp_path / "data", *flags) as gateway:
        job, cancelled = gateway.create(seed=1), gateway.create(seed=2)
        calls = {call.request.run_id: call for call in (stages.fusion.next_call(), stages.fusion.next_call())}
        with door_shut(bucket):
            assert gateway.cancel(cancelled.id).state == pb.JOB_STATE_CANCELLED
            calls[job.id].finish()
            end = gateway.end_of(job.id)
            assert end.state == pb.JOB_STATE_FAILED and end.error.code == "UNAVAILABLE", end
            assert "gave up after waiting 1 s: the artifact store" in end.error.message
        again = gateway.create(seed=3)
        stages.fusion.next_call().finish()
        assert gateway.end_of(again.id).state == pb.JOB_STATE_COMPLETED
        for one in (job, cancelled, again):
            gateway.delete(one.id)
        assert bucket.names(url, "artifacts") == []


def test_a_gateway_waits_for_its_bucket_and_refuses_one_that_is_not_there(stages, bucket, tmp_path):
    with door_shut(bucket):
        waiting = running_gateway(tmp_path / "a", "--artifacts-url", bucket.new_url(), *stages.flags, serving=False)
        gateway = waiting.__enter__()
        while not any(entry["event"] == "waiting for the artifact store" for entry in gateway.service.log):
            assert gateway.service.process.poll() is None
    with contextlib.ExitStack() as stack:
        stack.push(waiting.__exit__)
        gateway.service.wait_serving()
    flags = ("--artifacts-url", "s3://no-such-bucket", *stages.flags)
    with running_gateway(tmp_path / "b", *flags, serving=False) as gateway:
        assert gateway.service.process.wait(WAIT_S) == EXIT_BAD_CONFIG
    reasons = [str(entry["reason"]) for entry in gateway.service.log if entry["event"] == "cannot start"]
    assert len(reasons) == 1 and reasons[0].startswith("--artifacts-url s3://no-such-bucket cannot be used")
