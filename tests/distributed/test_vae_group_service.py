"""The VAE service on two gloo ranks under torchrun: frames, cancel, a killed rank, damaged files, drain."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import grpc
import numpy as np
import psutil
import pytest
import torch

from ovi.common.v1 import tensor_pb2
from ovi.vae.v1 import vae_pb2 as pb
from ovi.vae.v1 import vae_pb2_grpc as pb_grpc
from services.vae.checkpoint import load_audio_vae, load_video_vae, load_vocoder
from services.vae.engine import ClipWritten, VaeEngine
from services.vae.networks import Networks
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.variants import AUDIO_VAE_FILE, VIDEO_VAE_FILE, VOCODER_FILE
from tests.service_process import ServiceProcess, free_port, running_service
from tests.vae_checkpoint import write_checkpoint

RANKS = 2
TIMEOUT_S = 90
CPU = torch.device("cpu")


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


VIDEO, LONG_VIDEO, AUDIO = latent(48, 3, 6, 4), latent(48, 128, 8, 8), latent(18, 20)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def service(checkpoints: Path) -> Iterator[ServiceProcess]:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--grace-s", "5")
    with running_service("vae", *flags, ranks=RANKS, port=free_port()) as service:
        yield service


@pytest.fixture(scope="module")
def put() -> Iterator[Callable[[torch.Tensor], tensor_pb2.TensorRef]]:
    store = TensorStore(lease_s=600, max_bytes=1 << 28)
    server = TensorServer(store, host="127.0.0.1", port=0, advertise_host="127.0.0.1")
    yield lambda tensor: server.publish(store.put(tensor))
    server.stop(0)


@pytest.fixture
def stub(service: ServiceProcess) -> Iterator[pb_grpc.VaeServiceStub]:
    with service.channel() as channel:
        yield pb_grpc.VaeServiceStub(channel)


def ranks_of(service: ServiceProcess) -> dict[int, int]:
    """Process ids by rank."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child.pid for child in children if "services.vae" in child.cmdline()}


def decode_video(stub, put, video: torch.Tensor) -> np.ndarray:
    request = pb.DecodeVideoRequest(video_latent=put(video))
    header, *parts = stub.DecodeVideo(request, timeout=TIMEOUT_S, wait_for_ready=True)
    size = header.header.size
    data = np.frombuffer(b"".join(part.chunk for part in parts), np.uint8)
    return data.reshape(header.header.num_frames, size.height, size.width, 3)


def test_frames_are_those_of_one_process(stub, put, checkpoints) -> None:
    """Float32 in another order may move a value across a rounding edge: one level, in few places."""
    served = decode_video(stub, put, VIDEO)
    vae = load_video_vae(checkpoints / VIDEO_VAE_FILE, CPU, torch.float32)
    direct = torch.cat(list(vae.decode(VIDEO, torch.uint8))).numpy()
    difference = np.abs(served.astype(int) - direct)
    assert direct.std() > 5 and difference.max() <= 1 and np.count_nonzero(difference) <= direct.size * 1e-3


def pictures_of(path: Path) -> np.ndarray:
    with av.open(path) as clip:
        return np.stack([frame.to_ndarray(format="gray") for frame in clip.decode(video=0)])


def test_the_clip_is_that_of_one_process(stub, put, checkpoints, tmp_path) -> None:
    """H.264 of frames that differ in few places by one level, from which the encoder's choices may differ, too.

    Pictures of another clip, frame or stripe differ by about their spread.
    """
    request = pb.DecodeClipRequest(video_latent=put(VIDEO), audio_latent=put(AUDIO))
    *events, last = stub.DecodeClip(request, timeout=TIMEOUT_S)
    served, direct = tmp_path / "served.mp4", tmp_path / "direct.mp4"
    served.write_bytes(b"".join(event.chunk for event in events))
    engine = VaeEngine(
        Networks(
            load_video_vae(checkpoints / VIDEO_VAE_FILE, CPU, torch.float32),
            load_audio_vae(checkpoints / AUDIO_VAE_FILE, CPU),
            load_vocoder(checkpoints / VOCODER_FILE, CPU),
        ),
        chunk_latent_frames=1,
        fingerprint="",
    )
    *_, written = engine.decode_clip(VIDEO, AUDIO, {}, direct)
    assert isinstance(written, ClipWritten)
    assert (last.summary.num_frames, last.summary.num_samples) == (written.num_frames, written.num_samples)
    expected = pictures_of(direct).astype(int)
    assert expected.std() > 5 and np.abs(pictures_of(served) - expected).mean() < expected.std() / 10


def test_every_rank_is_described(stub, service) -> None:
    assert stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S).num_ranks == RANKS
    assert set(ranks_of(service)) == set(range(RANKS))


def test_cancel_between_chunks_leaves_every_rank_ready(stub, put, service) -> None:
    before = ranks_of(service)
    call = stub.DecodeClip(pb.DecodeClipRequest(video_latent=put(LONG_VIDEO), audio_latent=put(AUDIO)))
    assert next(call).progress.frames_total == 509
    call.cancel()
    decode_video(stub, put, VIDEO)
    assert ranks_of(service) == before, "no rank was restarted"


def test_refusals_cost_no_collective(stub, put, service) -> None:
    before = ranks_of(service)
    with pytest.raises(grpc.RpcError) as caught:
        decode_video(stub, put, latent(48, 1, 5, 4))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    decode_video(stub, put, VIDEO)
    assert ranks_of(service) == before


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_rank_killed_in_a_decode_brings_the_group_back(stub, put, service, victim) -> None:
    before = ranks_of(service)
    call = stub.DecodeClip(pb.DecodeClipRequest(video_latent=put(LONG_VIDEO), audio_latent=put(AUDIO)))
    next(call)
    os.kill(before[victim], signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    service.wait_serving()
    assert decode_video(stub, put, VIDEO).size
    after = ranks_of(service)
    assert len(after) == RANKS and set(after.values()).isdisjoint(before.values()), "every rank is a new process"


def test_sigterm_lets_a_decode_end_and_ends_all_ranks(stub, put, service) -> None:
    decode_video(stub, put, VIDEO)
    processes = [psutil.Process(pid) for pid in ranks_of(service).values()]
    call = stub.DecodeClip(pb.DecodeClipRequest(video_latent=put(latent(48, 8, 4, 4)), audio_latent=put(AUDIO)))
    next(call)
    service.process.send_signal(signal.SIGTERM)
    *_, last = call
    assert last.summary.num_frames == 29
    service.process.wait(TIMEOUT_S)
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert alive == []
    assert "stopped" in [entry["event"] for entry in service.log]


def test_a_damaged_file_ends_the_start_on_all_ranks_and_is_named(tmp_path) -> None:
    path = write_checkpoint(tmp_path) / VIDEO_VAE_FILE
    path.write_bytes(path.read_bytes()[:-1000])
    flags = ("--checkpoints", str(tmp_path), "--device", "cpu")
    with running_service("vae", *flags, ranks=RANKS, port=free_port(), serving=False) as service:
        assert service.process.wait(TIMEOUT_S) != 0
    reasons = [entry for entry in service.log if entry["event"] == "cannot start"]
    assert reasons and all(str(path) in str(entry["reason"]) for entry in reasons)
    assert [entry["event"] for entry in service.log].count("starting") == 1, "torchrun did not try again"


def test_a_mode_for_one_gpu_ends_the_start_with_its_reason(checkpoints) -> None:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--vram-mode", "streamed")
    with running_service("vae", *flags, ranks=RANKS, port=free_port(), serving=False) as service:
        assert service.process.wait(TIMEOUT_S) != 0
    reasons = [entry["reason"] for entry in service.log if entry["event"] == "cannot start"]
    assert 1 <= len(reasons) <= RANKS, "torchrun did not try again"
    assert all("got streamed, which is for one GPU, and 2 ranks" in str(reason) for reason in reasons)
