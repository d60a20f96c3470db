"""The fusion service as a process: streams, results, errors, cancellation, drain, reflection."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from ovi.common.v1 import generation_pb2
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.attention import sdpa
from services.fusion.checkpoint import FusionFile
from services.fusion.model.operations import Ops
from services.fusion.sampling.denoise import Conditions, bind_forward, bind_guidance, denoise, draw_noise
from shared.sampling_options import SamplingOptions
from shared.service_main import EXIT_BAD_CONFIG
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from tests.fusion_checkpoint import SMALL, write_variant
from tests.service_process import ServiceProcess, running_service

MODEL = "720x720_5s"
VIDEO, AUDIO = (48, 31, 4, 4), (157, 20)
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fusion")
    write_variant(folder, MODEL, seed=1)
    write_variant(folder, "960x960_5s", seed=2)
    broken = write_variant(folder, "960x960_10s")
    broken.write_bytes(broken.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def service(checkpoints) -> Iterator[ServiceProcess]:
    # Most tests here leave latents unfetched, for which a drain waits; that it waits is shown by a test of its own.
    flags = ("--checkpoints", str(checkpoints), "--max-pending", "2", "--grace-s", "1")
    with running_service("fusion", *flags) as service:
        yield service


@pytest.fixture
def stub(service) -> Iterator[pb_grpc.FusionServiceStub]:
    with service.channel() as channel:
        yield pb_grpc.FusionServiceStub(channel)
        description = pb_grpc.FusionServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S)
        assert description.num_pending == 0, "the service serves on, with nothing left behind"


@pytest.fixture(scope="module")
def producer() -> Iterator[TensorServer]:
    server = TensorServer(
        TensorStore(lease_s=600, max_bytes=1 << 28), host="127.0.0.1", port=0, advertise_host="127.0.0.1"
    )
    yield server
    server.stop(0)


@pytest.fixture(scope="module")
def resolver() -> Iterator[TensorResolver]:
    resolver = TensorResolver.over_grpc()
    yield resolver
    resolver.close()


def rows(seed: int, length: int = 6) -> torch.Tensor:
    return torch.randn(length, SMALL.text_dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def request_(producer) -> pb.DenoiseRequest:
    def publish(tensor):
        return producer.publish(producer.store.put(tensor))

    return pb.DenoiseRequest(
        model=MODEL,
        height=64,
        width=64,
        options=generation_pb2.SamplingOptions(num_inference_steps=3, slg_layer=1, seed=7),
        prompt=publish(rows(1)),
        video_negative=publish(rows(2)),
        audio_negative=publish(rows(3)),
    )


def run(stub, request) -> tuple[list[pb.Step], pb.Result]:
    begun, *steps, last = stub.Denoise(request, timeout=TIMEOUT_S)
    assert begun.begun == pb.Begun() and begun.WhichOneof("event") == "begun"
    assert last.WhichOneof("event") == "result"
    return [event.step for event in steps], last.result


OPTIONS = SamplingOptions(num_inference_steps=3, slg_layer=1, seed=7)


def reference(checkpoints, first_frame=None, options=OPTIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """The same run without any service."""
    model = FusionFile.open(checkpoints / "Ovi" / "model.safetensors").load(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        conditions = Conditions(*model.encode_texts([(rows(1), rows(1)), (rows(2), rows(3))]), first_frame)
    predict = bind_guidance(bind_forward(model, model.rope_tables(VIDEO[1:], AUDIO[0]), Ops.of(sdpa)))
    *_, latents = denoise(predict, draw_noise(VIDEO, AUDIO, 7), conditions, options)
    return latents.video_CFHW, latents.audio_SC


def test_denoise_streams_steps_and_the_latents_of_a_direct_run(stub, request_, resolver, checkpoints) -> None:
    steps, result = run(stub, request_)
    assert [(step.index, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [step.sigma for step in steps] == sorted((step.sigma for step in steps), reverse=True)
    assert all(step.seconds > 0 for step in steps)
    expected = reference(checkpoints)
    for ref, direct in zip((result.video_latent, result.audio_latent), expected, strict=True):
        latent = resolver.fetch(ref, field="latent", max_bytes=1 << 28)
        assert latent.dtype == torch.float32 and torch.isfinite(latent).all()
        torch.testing.assert_close(latent, direct, atol=1e-4, rtol=0)


def test_same_request_same_latents_whatever_ran_in_between(stub, request_, resolver) -> None:
    def latent(request):
        return resolver.fetch(run(stub, request)[1].video_latent, field="latent", max_bytes=1 << 28)

    first = latent(request_)
    other = pb.DenoiseRequest()
    other.CopyFrom(request_)
    other.model = "960x960_5s"
    assert not torch.equal(latent(other), first)
    assert torch.equal(latent(request_), first)


def test_image_to_video_keeps_the_picture(stub, request_, resolver, producer, checkpoints) -> None:
    picture = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(8))
    request_.first_frame_latent.CopyFrom(producer.publish(producer.store.put(picture)))
    _, result = run(stub, request_)
    latent = resolver.fetch(result.video_latent, field="latent", max_bytes=1 << 28)
    assert torch.equal(latent[:, :1], picture)
    torch.testing.assert_close(latent, reference(checkpoints, picture[:, 0])[0], atol=1e-4, rtol=0)


def test_step_cache_of_a_request(stub, request_, resolver, checkpoints) -> None:
    request_.options.num_inference_steps, request_.options.step_cache_threshold = 6, 1
    steps, result = run(stub, request_)
    # The first block's output changes by 0.51, 0.86, 1.33 and 1.19 of its size here.
    assert [step.reused for step in steps] == [False, True, True, False, False, False]
    latent = resolver.fetch(result.video_latent, field="latent", max_bytes=1 << 28)
    options = replace(OPTIONS, num_inference_steps=6, step_cache_threshold=1.0)
    torch.testing.assert_close(latent, reference(checkpoints, options=options)[0], atol=1e-4, rtol=0)
    request_.options.step_cache_threshold = 0
    steps, result = run(stub, request_)
    assert not any(step.reused for step in steps)
    computed = resolver.fetch(result.video_latent, field="latent", max_bytes=1 << 28)
    assert (computed - latent).norm() > 0.01 * computed.norm(), "it is lossy"


def test_guidance_of_one_needs_no_negatives(stub, request_) -> None:
    request_.options.video_guidance_scale = request_.options.audio_guidance_scale = 1
    request_.ClearField("video_negative")
    request_.ClearField("audio_negative")
    steps, _ = run(stub, request_)
    assert len(steps) == 3


def test_describe(stub) -> None:
    description = stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S)
    variants = {variant.id: variant for variant in description.variants}
    good = variants[MODEL]
    assert (good.num_frames, good.fps, good.audio_latent_length, good.num_layers) == (121, 24, 157, 3)
    assert (good.sizes[0].height, good.sizes[0].width) == (64, 64) and good.text_dim == SMALL.text_dim
    assert good.prompt_format == generation_pb2.PROMPT_FORMAT_AUDCAP_TAGS and len(good.fingerprint) == 16
    assert variants["960x960_10s"].problem and "truncated" in variants["960x960_10s"].problem
    assert description.device == "cpu"


def violations(error: grpc.RpcError) -> dict[str, str]:
    found = {}
    for detail in rpc_status.from_call(error).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            found |= {v.field: v.description for v in bad.field_violations}
    return found


def change(path: str, value: object):
    def apply(request: pb.DenoiseRequest) -> None:
        *parents, last = path.split(".")
        target = request
        for name in parents:
            target = getattr(target, name)
        setattr(target, last, value)

    return apply


@pytest.mark.parametrize(
    ("apply", "field"),
    [
        (change("model", "nope"), "model"),
        (change("model", ""), "model"),
        (change("height", 48), "height"),
        (change("width", 4096), "height"),
        (change("height", 0), "height"),
        (change("options.num_inference_steps", 0), "options.num_inference_steps"),
        (change("options.num_inference_steps", 10001), "options.num_inference_steps"),
        (change("options.video_guidance_scale", float("nan")), "options.video_guidance_scale"),
        (change("options.seed", -1), "options.seed"),
        (change("options.slg_layer", 3), "options.slg_layer"),
        (change("options.solver", 77), "options.solver"),
        (change("options.step_cache_threshold", 1.01), "options.step_cache_threshold"),
        (change("options.step_cache_threshold", -0.1), "options.step_cache_threshold"),
        (change("options.step_cache_threshold", float("nan")), "options.step_cache_threshold"),
        (lambda r: r.ClearField("prompt"), "prompt"),
        (lambda r: r.ClearField("audio_negative"), "audio_negative"),
        (change("prompt.address", "192.0.2.7:1"), "prompt.address"),
        (change("prompt.spec.num_bytes", 1 << 40), "prompt.spec.num_bytes"),
    ],
)
def test_bad_input_names_the_field(stub, request_, apply, field) -> None:
    apply(request_)
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, request_)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert field in violations(caught.value)


def test_all_violations_come_at_once(stub, request_) -> None:
    request_.height = 1
    request_.options.num_inference_steps = 0
    request_.options.seed = -5
    request_.ClearField("prompt")
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, request_)
    assert violations(caught.value).keys() == {"height", "options.num_inference_steps", "options.seed", "prompt"}


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(17, SMALL.text_dim), "must be [1 to 16, 24]"),
        (torch.zeros(0, SMALL.text_dim), "must be [1 to 16, 24]"),
        (torch.zeros(4, SMALL.text_dim + 1), "must be [1 to 16, 24]"),
        (torch.zeros(4, SMALL.text_dim, dtype=torch.uint8), "floating-point"),
        (torch.full((4, SMALL.text_dim), float("nan")), "NaN"),
    ],
)
def test_wrong_prompt_tensors(stub, request_, producer, tensor, says) -> None:
    request_.prompt.CopyFrom(producer.publish(producer.store.put(tensor)))
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, request_)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in violations(caught.value)["prompt"]


def test_lost_reference_and_damaged_variant_have_their_own_codes(stub, request_, producer) -> None:
    producer.store.release(request_.prompt.tensor_id)
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, request_)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    info = error_details_pb2.ErrorInfo()
    rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert info.reason == "TENSOR_REFERENCE_LOST"
    request_.model = "960x960_10s"
    with pytest.raises(grpc.RpcError) as caught:
        run(stub, request_)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "model_960x960_10s.safetensors" in caught.value.details()


def test_cancel_stops_before_the_next_step(service, stub, request_) -> None:
    request_.options.num_inference_steps = 1000
    call = stub.Denoise(request_, timeout=TIMEOUT_S)
    assert [next(call).WhichOneof("event") for _ in range(2)] == ["begun", "step"]
    call.cancel()
    request_.options.num_inference_steps = 1
    steps, _ = run(stub, request_)  # comes through long before 1000 steps could have ended
    assert len(steps) == 1


def test_deadline_stops_the_work(stub, request_) -> None:
    request_.options.num_inference_steps = 1000
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Denoise(request_, timeout=0.5))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    request_.options.num_inference_steps = 1
    run(stub, request_)


def test_a_full_queue_refuses_at_once(stub, request_) -> None:
    request_.options.num_inference_steps = 1000
    running = stub.Denoise(request_, timeout=TIMEOUT_S)
    next(running), next(running)  # begun, and its first step
    waiting = [stub.Denoise(request_, timeout=TIMEOUT_S) for _ in range(2)]
    refused = next(call for call in as_ended(waiting))
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "fusion queue is full (2 of 2)" in refused.details()
    for call in (running, *waiting):
        call.cancel()
    request_.options.num_inference_steps = 1
    run(stub, request_)


def as_ended(calls: list[grpc.CallIterator]) -> Iterator[grpc.CallIterator]:
    """The calls, as they end."""
    ended: queue.Queue[grpc.CallIterator] = queue.Queue()
    for call in calls:
        call.add_done_callback(lambda _, call=call: ended.put(call))
    while True:
        yield ended.get(timeout=TIMEOUT_S)


def test_reflection_v1_and_v1alpha_and_health(service) -> None:
    from grpc_reflection.v1alpha import reflection_pb2

    with service.channel() as channel:
        for version in ("v1", "v1alpha"):
            call = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            (answer,) = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=TIMEOUT_S)
            assert "ovi.fusion.v1.FusionService" in [s.name for s in answer.list_services_response.service]
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="ovi.fusion.v1.FusionService"), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_sigterm_drains_a_run_under_way(checkpoints, request_, resolver) -> None:
    with running_service("fusion", "--checkpoints", str(checkpoints)) as service, service.channel() as channel:
        request_.options.num_inference_steps = 20
        call = pb_grpc.FusionServiceStub(channel).Denoise(request_, timeout=TIMEOUT_S)
        next(call), next(call)  # begun, and its first step
        service.process.send_signal(signal.SIGTERM)
        *steps, last = call
        assert len(steps) == 19
        for ref in (last.result.video_latent, last.result.audio_latent):  # still served, though the process is ending
            assert torch.isfinite(resolver.fetch(ref, field="latent", max_bytes=1 << 28)).all()
            resolver.release(ref)
        assert service.process.wait(TIMEOUT_S) == 0
    events = [entry["event"] for entry in service.log]
    assert events.index("draining") < events.index("denoised") < events.index("stopped")


def test_nothing_to_serve_ends_the_process_with_a_reason(tmp_path) -> None:
    with running_service("fusion", "--checkpoints", str(tmp_path), serving=False) as service:
        assert service.process.wait(TIMEOUT_S) == EXIT_BAD_CONFIG
    reasons = [str(entry.get("reason")) for entry in service.log if entry["event"] == "cannot start"]
    assert len(reasons) == 1 and "Ovi/model.safetensors" in reasons[0]
