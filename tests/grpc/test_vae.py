"""The VAE service as a process: pictures to latents, latents to clips, frames and sound; bad inputs; cancel; drain."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import google_crc32c
import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

from ovi.common.v1 import generation_pb2, tensor_pb2
from ovi.vae.v1 import vae_pb2 as pb
from ovi.vae.v1 import vae_pb2_grpc as pb_grpc
from services.vae.checkpoint import load_audio_vae, load_video_vae, load_vocoder
from shared.service_main import EXIT_BAD_CONFIG
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE
from tests.service_process import ServiceProcess, running_service
from tests.vae_checkpoint import write_checkpoint

TIMEOUT_S = 60
CPU = torch.device("cpu")
LATENT_FRAMES, HEIGHT, WIDTH = 4, 4, 6
NUM_FRAMES = 13
AUDIO_LENGTH = 18
PROVENANCE = {"prompt": "A lighthouse keeper says <S>hello<E> = “storm”;\nnext line", "seed": "7", "model_hash": "ab12"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def service(checkpoints: Path, scratch: Path) -> Iterator[ServiceProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        with running_service("vae", "--checkpoints", str(checkpoints), "--chunk-latent-frames", "2") as service:
            yield service


@pytest.fixture
def stub(service: ServiceProcess, scratch: Path) -> Iterator[pb_grpc.VaeServiceStub]:
    """After every test the service still works, and left no temporary file behind."""
    with service.channel() as channel:
        stub = pb_grpc.VaeServiceStub(channel)
        yield stub
        response = stub.EncodeImage(upload(encode(gradient(32, 32)), 32, 32), timeout=TIMEOUT_S)
        assert response.latent.spec.shape == [48, 1, 2, 2]
    assert not list(scratch.iterdir())


@pytest.fixture(scope="module")
def producer() -> Iterator[TensorServer]:
    store = TensorStore(lease_s=600, max_bytes=1 << 28)
    server = TensorServer(store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
    yield server
    server.stop(0)


@pytest.fixture(scope="module")
def resolver() -> Iterator[TensorResolver]:
    resolver = TensorResolver.over_grpc()
    yield resolver
    resolver.close()


def latent(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


VIDEO = latent(48, LATENT_FRAMES, HEIGHT, WIDTH)
AUDIO = latent(AUDIO_LENGTH, 20)


@pytest.fixture
def put(producer: TensorServer) -> Callable[[torch.Tensor], tensor_pb2.TensorRef]:
    return lambda tensor: producer.publish(producer.store.put(tensor))


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x * y) % 256], -1).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def upload(data: bytes, height: int, width: int, chunk_bytes: int = 1 << 20) -> Iterator[pb.EncodeImageRequest]:
    yield pb.EncodeImageRequest(size=generation_pb2.Size(height=height, width=width))
    for start in range(0, len(data), chunk_bytes):
        yield pb.EncodeImageRequest(chunk=data[start : start + chunk_bytes])


def violations(error: grpc.RpcError) -> dict[str, str]:
    bad = error_details_pb2.BadRequest()
    for detail in rpc_status.from_call(error).details:
        if detail.Unpack(bad):
            return {violation.field: violation.description for violation in bad.field_violations}
    return {}


def drain(call: Iterable[object]) -> list[object]:
    return list(call)


# --- What it makes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_encode_image_equals_encoding_directly(stub, checkpoints, resolver, kind) -> None:
    data = encode(gradient(64, 96), kind)
    response = stub.EncodeImage(upload(data, 64, 96, chunk_bytes=1000), timeout=TIMEOUT_S)
    served = resolver.fetch(response.latent, field="latent", max_bytes=1 << 20)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    vae = load_video_vae(checkpoints / VIDEO_VAE_FILE, CPU, torch.float32)
    direct = vae.encode(pixels.permute(2, 0, 1)[None, :, None] / 127.5 - 1.0)[0]
    assert served.dtype == torch.float32
    torch.testing.assert_close(served, direct, atol=1e-5, rtol=1e-5)


def test_decode_video_equals_decoding_directly(stub, checkpoints, put) -> None:
    header, *parts = stub.DecodeVideo(pb.DecodeVideoRequest(video_latent=put(VIDEO)), timeout=TIMEOUT_S)
    assert (header.header.num_frames, header.header.fps) == (NUM_FRAMES, 24)
    size = (header.header.size.height, header.header.size.width)
    served = np.frombuffer(b"".join(part.chunk for part in parts), np.uint8).reshape(NUM_FRAMES, *size, 3)
    network = load_video_vae(checkpoints / VIDEO_VAE_FILE, CPU, torch.float32)
    raw = network.network.decode(VIDEO[None] * network.std_C111 + network.mean_C111, return_dict=False)[0][0]
    direct = ((raw + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert direct.std() > 10, "the pictures are not flat"
    assert np.abs(served - direct).max() <= 0.5 + 1e-2


def test_decode_audio_equals_decoding_directly(stub, checkpoints, put) -> None:
    header, *parts = stub.DecodeAudio(pb.DecodeAudioRequest(audio_latent=put(AUDIO)), timeout=TIMEOUT_S)
    assert (header.header.num_samples, header.header.sample_rate_hz) == (AUDIO_LENGTH * 512, 16_000)
    served = np.frombuffer(b"".join(part.chunk for part in parts), "<f4")
    mel = load_audio_vae(checkpoints / AUDIO_VAE_FILE, CPU).decode(AUDIO.T[None])
    direct = load_vocoder(checkpoints / VOCODER_FILE, CPU)(mel)[0].numpy()
    assert len(served) == AUDIO_LENGTH * 512
    assert direct.std() > 1e-3, "the sound is not silence"
    np.testing.assert_allclose(served, direct, atol=1e-5)


@pytest.mark.parametrize("audio_length", [2, AUDIO_LENGTH, 60], ids=["short", "fitting", "long"])
def test_decode_clip_makes_a_whole_mp4(stub, put, tmp_path, audio_length) -> None:
    request = pb.DecodeClipRequest(
        video_latent=put(VIDEO), audio_latent=put(latent(audio_length, 20)), provenance=PROVENANCE
    )
    events = drain(stub.DecodeClip(request, timeout=TIMEOUT_S))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == sorted(kinds, key=["progress", "chunk", "summary"].index), "progress, then the file, then its end"
    assert kinds[-1] == "summary"
    progress = [event.progress for event in events if event.WhichOneof("event") == "progress"]
    # One latent frame alone, then two and one more of the chunk of two: 1 + 4, 8 pictures.
    assert [p.frames_done for p in progress] == [5, 13]
    assert {p.frames_total for p in progress} == {NUM_FRAMES}
    data = b"".join(event.chunk for event in events)
    summary = events[-1].summary
    assert (summary.num_bytes, summary.crc32c) == (len(data), google_crc32c.value(data))
    assert (summary.num_frames, summary.num_samples, summary.sample_rate_hz) == (NUM_FRAMES, 8667, 16_000)
    assert (summary.size.height, summary.size.width) == (HEIGHT * 16, WIDTH * 16)
    assert data.index(b"moov") < data.index(b"mdat"), "faststart: players need not read to the end first"
    _check_clip(data, frames_equal_to=_frames(stub, put))


def _frames(stub, put) -> np.ndarray:
    _, *parts = stub.DecodeVideo(pb.DecodeVideoRequest(video_latent=put(VIDEO)), timeout=TIMEOUT_S)
    pixels = np.frombuffer(b"".join(part.chunk for part in parts), np.uint8)
    return pixels.reshape(NUM_FRAMES, HEIGHT * 16, WIDTH * 16, 3)


def _check_clip(data: bytes, frames_equal_to: np.ndarray) -> None:
    with av.open(io.BytesIO(data)) as clip:
        video, audio = clip.streams.video[0], clip.streams.audio[0]
        assert (video.codec_context.name, video.average_rate, video.frames) == ("h264", 24, NUM_FRAMES)
        assert (video.codec_context.pix_fmt, video.width, video.height) == ("yuv420p", WIDTH * 16, HEIGHT * 16)
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 16_000, 1)
        seconds = [float(stream.duration * stream.time_base) for stream in (video, audio)]
        assert abs(seconds[0] - seconds[1]) <= 1 / 24, "sound and video last equally long"
        assert {key: clip.metadata[key] for key in PROVENANCE} == PROVENANCE
        assert clip.metadata["title"] == PROVENANCE["prompt"]
        assert "Ovi" in clip.metadata["comment"]
        decoded = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    # Against the pictures at a quarter of their size, where halved colour resolution hardly shows.
    ours, expected = (
        np.stack(frames).reshape(NUM_FRAMES, HEIGHT * 4, 4, WIDTH * 4, 4, 3).mean((2, 4))
        for frames in (decoded, frames_equal_to)
    )
    assert np.abs(ours - expected).mean() < 4.0


def test_a_single_latent_frame_makes_a_clip_of_one_picture(stub, put) -> None:
    request = pb.DecodeClipRequest(video_latent=put(latent(48, 1, 2, 2)), audio_latent=put(latent(1, 20)))
    events = drain(stub.DecodeClip(request, timeout=TIMEOUT_S))
    assert events[-1].summary.num_frames == 1
    with av.open(io.BytesIO(b"".join(event.chunk for event in events))) as clip:
        assert len(list(clip.decode(video=0))) == 1


def test_half_precision_latents_are_taken(stub, put) -> None:
    request = pb.DecodeVideoRequest(video_latent=put(VIDEO[:, :1].bfloat16()))
    _, *parts = stub.DecodeVideo(request, timeout=TIMEOUT_S)
    assert sum(len(part.chunk) for part in parts) == HEIGHT * WIDTH * 256 * 3


def test_describe_model(stub) -> None:
    description = stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S)
    assert (description.device, description.precision) == ("cpu", "float32")
    assert description.chunk_latent_frames == 2
    assert len(description.fingerprint) == 16


# --- What it refuses -------------------------------------------------------------------------------------------------


def _bomb() -> bytes:
    data = bytearray(encode(gradient(8, 8)))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    return bytes(data)


def _size(height: int, width: int) -> pb.EncodeImageRequest:
    return pb.EncodeImageRequest(size=generation_pb2.Size(height=height, width=width))


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        pytest.param([], ["size"], id="nothing"),
        pytest.param([pb.EncodeImageRequest(chunk=b"x")], ["size"], id="chunk-first"),
        pytest.param([_size(32, 32), _size(32, 32)], ["size"], id="size-twice"),
        pytest.param([_size(33, 0)], ["size.height", "size.width"], id="illegal-size"),
        pytest.param([_size(32, 4128)], ["size.width"], id="large-size"),
        pytest.param([_size(32, 32), pb.EncodeImageRequest()], ["part"], id="empty-message"),
        pytest.param([_size(32, 32), pb.EncodeImageRequest(chunk=bytes((1 << 20) + 1))], ["chunk"], id="large-chunk"),
        pytest.param([_size(32, 32)] + [pb.EncodeImageRequest(chunk=bytes(1 << 20))] * 33, ["image"], id="large-file"),
        pytest.param([_size(32, 32)], ["image"], id="no-bytes"),
        pytest.param([_size(32, 32), pb.EncodeImageRequest(chunk=b"no picture")], ["image"], id="no-picture"),
        pytest.param([_size(32, 32), pb.EncodeImageRequest(chunk=encode(gradient(8, 8), "GIF"))], ["image"], id="gif"),
        pytest.param(
            [_size(32, 32), pb.EncodeImageRequest(chunk=encode(gradient(99, 99))[:-90])], ["image"], id="torn"
        ),
        pytest.param([_size(32, 32), pb.EncodeImageRequest(chunk=_bomb())], ["image"], id="bomb"),
    ],
)
def test_bad_uploads_are_refused_by_field(stub, messages, fields) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.EncodeImage(iter(messages), timeout=TIMEOUT_S)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(caught.value)) == fields


@pytest.mark.parametrize(
    ("video", "audio", "provenance", "fields"),
    [
        pytest.param(
            latent(47, 1, 3, 2).byte(),
            latent(18),
            {"Bad Key": "x", "encoder": "x", "long": "x" * 8193, "nul": "a\0b"},
            [
                "provenance[Bad Key]",
                "provenance[encoder]",
                "provenance[long]",
                "provenance[nul]",
                "video_latent.spec.data_type",
                "video_latent.spec.shape",
                "audio_latent.spec.shape",
            ],
            id="everything-at-once",
        ),
        pytest.param(VIDEO, AUDIO, {f"k{i}": "" for i in range(33)}, ["provenance"], id="many-entries"),
        pytest.param(latent(48, 129, 2, 2), AUDIO, {}, ["video_latent.spec.shape"], id="many-frames"),
        pytest.param(latent(48, 0, 2, 2), AUDIO, {}, ["video_latent.spec.shape"], id="no-frames"),
        pytest.param(latent(48, 1, 2, 258), AUDIO, {}, ["video_latent.spec.shape"], id="wide"),
        pytest.param(latent(48, 1, 5, 4), AUDIO, {}, ["video_latent.spec.shape"], id="odd"),
        pytest.param(latent(1, 48, 1, 2, 2), AUDIO, {}, ["video_latent.spec.shape"], id="batched"),
        pytest.param(VIDEO, latent(4097, 20), {}, ["audio_latent.spec.shape"], id="long-sound"),
        pytest.param(VIDEO, latent(0, 20), {}, ["audio_latent.spec.shape"], id="no-sound"),
        pytest.param(VIDEO * float("nan"), AUDIO / 0, {}, ["video_latent", "audio_latent"], id="not-finite"),
    ],
)
def test_bad_latents_are_refused_by_field(stub, put, video, audio, provenance, fields) -> None:
    request = pb.DecodeClipRequest(video_latent=put(video), audio_latent=put(audio), provenance=provenance)
    with pytest.raises(grpc.RpcError) as caught:
        drain(stub.DecodeClip(request, timeout=TIMEOUT_S))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(caught.value)) == fields


def test_missing_references_are_refused_by_field(stub, put) -> None:
    for call, request, fields in (
        (stub.DecodeClip, pb.DecodeClipRequest(), ["video_latent", "audio_latent"]),
        (stub.DecodeVideo, pb.DecodeVideoRequest(), ["video_latent"]),
        (stub.DecodeAudio, pb.DecodeAudioRequest(), ["audio_latent"]),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            drain(call(request, timeout=TIMEOUT_S))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert list(violations(caught.value)) == fields


def test_a_lost_reference_says_so(stub, put, producer) -> None:
    lost = put(VIDEO)
    producer.store.release(lost.tensor_id)
    with pytest.raises(grpc.RpcError) as caught:
        drain(stub.DecodeClip(pb.DecodeClipRequest(video_latent=lost, audio_latent=put(AUDIO)), timeout=TIMEOUT_S))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    infos = [error_details_pb2.ErrorInfo() for _ in rpc_status.from_call(caught.value).details]
    reasons = [i.reason for d, i in zip(rpc_status.from_call(caught.value).details, infos, strict=True) if d.Unpack(i)]
    assert reasons == ["TENSOR_REFERENCE_LOST"]


def test_references_to_strangers_are_refused(stub, put) -> None:
    elsewhere = put(VIDEO)
    elsewhere.address = "192.0.2.1:80"
    with pytest.raises(grpc.RpcError) as caught:
        drain(stub.DecodeVideo(pb.DecodeVideoRequest(video_latent=elsewhere), timeout=TIMEOUT_S))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations(caught.value)) == ["video_latent.address"]


# --- How it lives ----------------------------------------------------------------------------------------------------


def test_cancel_stops_a_decode_between_chunks(stub, put, service) -> None:
    """A decode of 509 frames is cancelled after its first progress; the next call does not wait for the rest."""
    request = pb.DecodeClipRequest(video_latent=put(latent(48, 128, 8, 8)), audio_latent=put(AUDIO))
    call = stub.DecodeClip(request, timeout=TIMEOUT_S)
    first = next(iter(call))
    assert first.progress.frames_done < first.progress.frames_total == 509
    call.cancel()
    response = stub.DecodeAudio(pb.DecodeAudioRequest(audio_latent=put(AUDIO)), timeout=TIMEOUT_S)
    assert len(drain(response)) > 1
    assert not [entry for entry in service.log if entry.get("level") == "error"]


def test_a_deadline_ends_a_decode(stub, put) -> None:
    request = pb.DecodeVideoRequest(video_latent=put(latent(48, 128, 8, 8)))
    with pytest.raises(grpc.RpcError) as caught:
        drain(stub.DecodeVideo(request, timeout=0.5))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_health_and_reflection(stub, service) -> None:
    with service.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="ovi.vae.v1.VaeService"), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (listing,) = reflection.ServerReflectionInfo(iter([question]), timeout=TIMEOUT_S)
        names = {listed.name for listed in listing.list_services_response.service}
        assert {"ovi.vae.v1.VaeService", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("file", [VIDEO_VAE_FILE, AUDIO_VAE_FILE, VOCODER_FILE])
def test_a_damaged_checkpoint_ends_the_start_and_is_named(tmp_path, file) -> None:
    folder = write_checkpoint(tmp_path)
    path = folder / file
    path.write_bytes(path.read_bytes()[:-1000])
    with running_service("vae", "--checkpoints", str(folder), serving=False) as service:
        assert service.process.wait(TIMEOUT_S) == EXIT_BAD_CONFIG
    reasons = [str(entry["reason"]) for entry in service.log if entry.get("event") == "cannot start"]
    assert len(reasons) == 1
    assert str(path) in reasons[0]


def test_sigterm_lets_a_decode_end(checkpoints, put) -> None:
    with running_service("vae", "--checkpoints", str(checkpoints)) as service, service.channel() as channel:
        request = pb.DecodeClipRequest(video_latent=put(latent(48, 16, 4, 4)), audio_latent=put(AUDIO))
        call = pb_grpc.VaeServiceStub(channel).DecodeClip(request, timeout=TIMEOUT_S)
        events = iter(call)
        next(events)
        service.process.send_signal(signal.SIGTERM)
        assert drain(events)[-1].summary.num_frames == 61
        assert service.process.wait(TIMEOUT_S) == 0
