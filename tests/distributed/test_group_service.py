"""The fusion service on four gloo ranks under torchrun: results, cancel, refusals, a killed rank, drain."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Iterator

import grpc
import psutil
import pytest
import torch

from ovi.common.v1 import generation_pb2
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.engine import FusionEngine
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import Latents
from shared.sampling_options import SamplingOptions
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from tests.fusion_checkpoint import SMALL, write_variant
from tests.service_process import ServiceProcess, free_port, running_service

RANKS = 4
MODEL, OTHER = "720x720_5s", "960x960_5s"
TIMEOUT_S = 90
TOLERANCE = 1e-5
"""Of the largest value, float32: the split changes the order of sums only."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    write_variant(folder, MODEL, seed=1)
    write_variant(folder, OTHER, seed=2)
    return folder


@pytest.fixture(scope="module")
def service(checkpoints) -> Iterator[ServiceProcess]:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--grace-s", "5")
    with running_service("fusion", *flags, ranks=RANKS, port=free_port()) as service:
        yield service


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


def rows(seed: int) -> torch.Tensor:
    return torch.randn(6, SMALL.text_dim, generator=torch.Generator().manual_seed(seed))


def denoise_request(producer, *, model: str = MODEL, steps: int = 2) -> pb.DenoiseRequest:
    refs = [producer.publish(producer.store.put(rows(seed))) for seed in (1, 2, 3)]
    options = generation_pb2.SamplingOptions(num_inference_steps=steps, slg_layer=1, seed=7)
    return pb.DenoiseRequest(
        model=model,
        height=64,
        width=64,
        options=options,
        prompt=refs[0],
        video_negative=refs[1],
        audio_negative=refs[2],
    )


def run(service, request) -> pb.Result:
    with service.channel() as channel:
        *_, last = pb_grpc.FusionServiceStub(channel).Denoise(request, timeout=TIMEOUT_S, wait_for_ready=True)
    return last.result


def ranks_of(service) -> list[psutil.Process]:
    return [p for p in psutil.Process(service.process.pid).children(recursive=True) if "services.fusion" in p.cmdline()]


def test_nothing_of_the_group_listens_beyond_the_loopback(service) -> None:
    """Neither torchrun's store nor the ranks', nor gloo."""
    listeners = [
        # gRPC binds IPv4 addresses as IPv6 ones.
        connection.laddr.ip.removeprefix("::ffff:")
        for process in [psutil.Process(service.process.pid), *ranks_of(service)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listeners) >= RANKS, "gloo alone listens once a rank"
    assert [address for address in listeners if not ipaddress.ip_address(address).is_loopback] == []


@pytest.mark.parametrize("model", [MODEL, OTHER])
def test_four_ranks_give_what_one_process_gives(service, producer, resolver, checkpoints, model) -> None:
    result = run(service, denoise_request(producer, model=model))
    engine = FusionEngine(checkpoints, torch.device("cpu"), torch.float32)
    engine.discover()
    spec = RunSpec(model, 64, 64, SamplingOptions(num_inference_steps=2, slg_layer=1, seed=7))
    *_, expected = engine.denoise(spec, RunInputs(rows(1), rows(2), rows(3), None))
    assert isinstance(expected, Latents)
    for ref, value in ((result.video_latent, expected.video_CFHW), (result.audio_latent, expected.audio_SC)):
        latent = resolver.fetch(ref, field="latent", max_bytes=1 << 28)
        assert (latent - value).abs().max() <= TOLERANCE * value.abs().max()


def test_plan_is_described(service) -> None:
    with service.channel() as channel:
        description = pb_grpc.FusionServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S)
    assert description.plan == "guidance 2 x sequence 2"
    assert len(ranks_of(service)) == RANKS


def test_cancel_between_steps_leaves_every_rank_ready(service, producer) -> None:
    before = {process.pid for process in ranks_of(service)}
    with service.channel() as channel:
        call = pb_grpc.FusionServiceStub(channel).Denoise(denoise_request(producer, steps=1000), timeout=TIMEOUT_S)
        assert [next(call).WhichOneof("event") for _ in range(2)] == ["begun", "step"]
        call.cancel()
    run(service, denoise_request(producer))
    assert {process.pid for process in ranks_of(service)} == before, "no rank was restarted"


def test_refusals_cost_no_collective(service, producer) -> None:
    before = {process.pid for process in ranks_of(service)}
    request = denoise_request(producer)
    request.height = 48
    with pytest.raises(grpc.RpcError) as caught:
        run(service, request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    run(service, denoise_request(producer))
    assert {process.pid for process in ranks_of(service)} == before


def test_a_file_damaged_after_the_start_is_refused_on_all_ranks(service, producer, checkpoints) -> None:
    assert_damage_is_refused(service, producer, checkpoints)


def assert_damage_is_refused(service, producer, checkpoints) -> None:
    run(service, denoise_request(producer, model=MODEL))
    path = checkpoints / "Ovi" / "model_960x960.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    try:
        with pytest.raises(grpc.RpcError) as caught:
            run(service, denoise_request(producer, model=OTHER))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "model_960x960.safetensors" in caught.value.details()
    finally:
        path.write_bytes(content)
    run(service, denoise_request(producer, model=OTHER))


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_killed_in_a_step_brings_the_group_back(service, producer, victim) -> None:
    before = {process.pid for process in ranks_of(service)}
    with service.channel() as channel:
        call = pb_grpc.FusionServiceStub(channel).Denoise(denoise_request(producer, steps=1000), timeout=TIMEOUT_S)
        next(call), next(call)  # begun, and its first step
        (process,) = [p for p in ranks_of(service) if p.environ()["RANK"] == str(victim)]
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            list(call)
    service.wait_serving()
    run(service, denoise_request(producer))
    after = {process.pid for process in ranks_of(service)}
    assert len(after) == RANKS and after.isdisjoint(before), "every rank is a new process"


def test_sigterm_ends_all_ranks(service, producer) -> None:
    run(service, denoise_request(producer))
    processes = ranks_of(service)
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(TIMEOUT_S)
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert alive == []
    assert "stopped" in [entry["event"] for entry in service.log]
