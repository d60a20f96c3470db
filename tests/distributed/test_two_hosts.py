"""The fusion service across two agents of torchrun with shared weights: results, cancel, a killed rank on either."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import grpc
import psutil
import pytest
import torch

from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.engine import FusionEngine
from services.fusion.request import RunInputs, RunSpec
from services.fusion.sampling.denoise import Latents
from shared.sampling_options import SamplingOptions
from tests.distributed.hosts import running_on_two_hosts
from tests.distributed.test_group_service import (
    MODEL,
    TIMEOUT_S,
    TOLERANCE,
    assert_damage_is_refused,
    checkpoints,
    denoise_request,
    producer,
    ranks_of,
    resolver,
    rows,
    run,
)
from tests.service_process import ServiceProcess

__all__ = ["checkpoints", "producer", "resolver"]


@pytest.fixture(scope="module")
def hosts(checkpoints, tmp_path_factory) -> Iterator[list[ServiceProcess]]:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu", "--grace-s", "5", "--plan", "fsdp", "--insecure")
    log_dir = tmp_path_factory.mktemp("hosts")
    with running_on_two_hosts("services.fusion", *flags, ranks_per_host=1, log_dir=log_dir) as hosts:
        yield hosts


def all_ranks(hosts: list[ServiceProcess]) -> dict[str, psutil.Process]:
    """Every rank's process by its number."""
    return {process.environ()["RANK"]: process for host in hosts for process in ranks_of(host)}


def test_two_hosts_give_what_one_process_gives(hosts, producer, resolver, checkpoints) -> None:
    result = run(hosts[0], denoise_request(producer))
    engine = FusionEngine(checkpoints, torch.device("cpu"), torch.float32)
    engine.discover()
    spec = RunSpec(MODEL, 64, 64, SamplingOptions(num_inference_steps=2, slg_layer=1, seed=7))
    *_, expected = engine.denoise(spec, RunInputs(rows(1), rows(2), rows(3), None))
    assert isinstance(expected, Latents)
    for ref, value in ((result.video_latent, expected.video_CFHW), (result.audio_latent, expected.audio_SC)):
        latent = resolver.fetch(ref, field="latent", max_bytes=1 << 28)
        assert (latent - value).abs().max() <= TOLERANCE * value.abs().max()


def test_plan_is_described(hosts) -> None:
    with hosts[0].channel() as channel:
        description = pb_grpc.FusionServiceStub(channel).DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S)
    assert description.plan == "guidance 2 x sequence 1, weights over 2"
    assert [len(ranks_of(host)) for host in hosts] == [1, 1]


def test_cancel_between_steps_leaves_every_rank_ready(hosts, producer) -> None:
    before = {process.pid for process in all_ranks(hosts).values()}
    with hosts[0].channel() as channel:
        call = pb_grpc.FusionServiceStub(channel).Denoise(denoise_request(producer, steps=1000), timeout=TIMEOUT_S)
        assert [next(call).WhichOneof("event") for _ in range(2)] == ["begun", "step"]
        call.cancel()
    run(hosts[0], denoise_request(producer))
    assert {process.pid for process in all_ranks(hosts).values()} == before, "no rank was restarted"


def test_a_file_damaged_after_the_start_is_refused_on_both_hosts(hosts, producer, checkpoints) -> None:
    before = {process.pid for process in all_ranks(hosts).values()}
    assert_damage_is_refused(hosts[0], producer, checkpoints)
    assert {process.pid for process in all_ranks(hosts).values()} == before, "no rank was restarted"


@pytest.mark.parametrize("victim", ["1", "0"])
def test_a_rank_killed_in_a_step_brings_both_hosts_back(hosts, producer, victim) -> None:
    before = all_ranks(hosts)
    with hosts[0].channel() as channel:
        call = pb_grpc.FusionServiceStub(channel).Denoise(denoise_request(producer, steps=1000), timeout=TIMEOUT_S)
        next(call), next(call)  # begun, and its first step
        os.kill(before[victim].pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError):
            list(call)
    psutil.wait_procs(before.values(), timeout=TIMEOUT_S)
    hosts[0].wait_serving()
    run(hosts[0], denoise_request(producer))
    after = {process.pid for process in all_ranks(hosts).values()}
    assert len(after) == 2 and after.isdisjoint(process.pid for process in before.values())
