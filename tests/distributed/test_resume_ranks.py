"""Runs that go on from a state on two ranks: the same latents to the bit, on every split and after a killed group."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import grpc
import pytest
import torch

from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.attention import sdpa
from services.fusion.checkpoint import build
from services.fusion.model.operations import Ops
from services.fusion.parallel.agreement import bind_agreement
from services.fusion.parallel.groups import make_groups
from services.fusion.parallel.parallelize import make_predictor
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.quantization import quantize
from services.fusion.sampling.control import LONGEST_WAIT_S
from services.fusion.sampling.denoise import Latents, denoise, draw_noise
from services.fusion.sampling.run_file import RunShape, pack, unpack
from shared.memory.modes import VramMode, WeightFormat
from shared.sampling_options import SamplingOptions, Solver
from tests.distributed.ranks import run_ranks
from tests.distributed.test_group_service import ranks_of
from tests.distributed.test_parallel import CONFIG, conditions_of
from tests.fusion_checkpoint import random_weights, write_variant
from tests.grpc.test_fusion_checkpoints import MODEL, TIMEOUT_S, Caller, Made, assert_same, caller, producer, resolver
from tests.service_process import free_port, running_service

__all__ = ["caller", "producer", "resolver"]
VIDEO, AUDIO_LENGTH, STEPS = (48, 3, 2, 6), 9, 4


@torch.inference_mode()
def resume_everywhere(plan: ParallelPlan) -> dict[str, torch.Tensor]:
    """Whether a run was the same from its states, by kind of run."""
    groups = make_groups(plan)
    told = {}
    for weights in (WeightFormat.NATIVE, WeightFormat.INT8):
        model = build(CONFIG, {key: value.float() for key, value in random_weights(CONFIG).items()})
        quantize(model, weights)
        rope = model.rope_tables(VIDEO[1:], AUDIO_LENGTH)
        predict = make_predictor(model, rope, Ops.of(sdpa), groups, graphs=False)
        for solver in Solver:
            for picture in (False, True):
                options = SamplingOptions(STEPS, solver=solver, slg_layer=1)
                name = f"{weights.value} {solver.value} {'i2v' if picture else 't2v'}"
                told[name] = torch.tensor(_resumed_alike(predict, model, options, picture, groups))
        told[f"{weights.value} step cache"] = torch.tensor(
            _resumed_alike(predict, model, replace(options, step_cache_threshold=0.9), True, groups)
        )
    return told


def _resumed_alike(predict, model, options: SamplingOptions, picture: bool, groups) -> list[bool]:
    conditions = conditions_of(model, picture, options, VIDEO)
    agree = bind_agreement(groups)
    noise = draw_noise(VIDEO, (AUDIO_LENGTH, 20), 5)
    *steps, final = denoise(predict, noise, conditions, options, agree)
    alike = []
    shape = RunShape(VIDEO, (AUDIO_LENGTH, 20), options)
    states = [step.state for step in steps if step.state is not None and step.state.steps_done > 1]
    for state in states[:1]:
        kept = unpack(pack(state, {}, VramMode.STANDARD), {}, shape)
        *_, again = denoise(predict, draw_noise(VIDEO, (AUDIO_LENGTH, 20), 6), conditions, options, agree, kept)
        assert isinstance(final, Latents) and isinstance(again, Latents)
        pairs = ((again.video_CFHW, final.video_CFHW), (again.audio_SC, final.audio_SC))
        alike.append(all(bool(torch.isfinite(one).all()) and torch.equal(one, other) for one, other in pairs))
    return alike


@pytest.mark.parametrize("plan", [(2, 1), (1, 2)], ids=["guidance", "sequence"])
def test_on_two_ranks_a_state_leads_to_the_same_latents(plan) -> None:
    plan = ParallelPlan(*plan)
    for told in run_ranks(plan.world_size, resume_everywhere, plan):
        assert len(told) == 14
        assert {name: alike.tolist() for name, alike in told.items()} == {name: [True] for name in told}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    write_variant(folder, MODEL, seed=1)
    return folder


def ranks_wait_for_a_reader(stub, caller: Caller, request: pb.DenoiseRequest, start: torch.Tensor, whole: Made) -> None:
    """Twice the reader holds a checkpoint back: once it then keeps it, once it goes away."""
    for keeps in (True, False):
        request.checkpoint.CopyFrom(caller.publish(start))
        call = stub.Denoise(request, timeout=TIMEOUT_S)
        made = Made()
        for event in call:
            if event.WhichOneof("event") == "checkpoint":
                break
            made.add(event, caller)
        made.add(next(call), caller)
        assert made.steps == [made.begun.steps_done + n + 1 for n in range(request.checkpoint_steps)]
        for _ in range(20):  # time enough for a further step
            assert stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S).num_pending == 1
        if keeps:
            made.add(event, caller)
            for event in call:
                made.add(event, caller)
            assert_same(made.latents, whole.latents)
        else:
            call.cancel()
    request.checkpoint.CopyFrom(caller.publish(start))
    begun_s = time.monotonic()
    assert_same(caller.run(stub, request).latents, whole.latents)
    assert time.monotonic() - begun_s < LONGEST_WAIT_S


@pytest.mark.timeout(300)
def test_a_killed_group_and_a_paused_run_go_on(checkpoints, caller: Caller) -> None:
    flags = ("--checkpoints", str(checkpoints), "--device", "cpu")
    with running_service("fusion", *flags, ranks=2, port=free_port()) as service, service.channel() as channel:
        stub = pb_grpc.FusionServiceStub(channel)
        request = caller.request(picture=True, run_id="job", num_inference_steps=30)
        whole = caller.run(stub, request)
        made = Made()
        victim = ranks_of(service)[-1].pid
        with pytest.raises(grpc.RpcError):
            for event in stub.Denoise(request, timeout=TIMEOUT_S):
                made.add(event, caller)
                if made.files and victim:
                    os.kill(victim, signal.SIGKILL)
                    victim = 0
        service.wait_serving()
        kept = max(made.files)
        request.checkpoint.CopyFrom(caller.publish(made.files[kept]))
        paused = Made()
        for event in stub.Denoise(request, timeout=TIMEOUT_S, wait_for_ready=True):
            paused.add(event, caller)
            if paused.kinds[-1] == "step" and len(paused.steps) == 1:
                assert stub.PauseRun(pb.PauseRunRequest(run_id="job"), timeout=TIMEOUT_S).running
        assert paused.begun == pb.Begun(steps_done=kept) and paused.kinds[-2:] == ["checkpoint", "paused"]
        pids = {process.pid for process in ranks_of(service)}
        request.checkpoint.CopyFrom(caller.publish(paused.files[max(paused.files)]))
        rest = caller.run(stub, request)
        assert rest.steps == list(range(max(paused.files) + 1, 31))
        assert_same(rest.latents, whole.latents)
        ranks_wait_for_a_reader(stub, caller, request, made.files[kept], whole)
        assert {process.pid for process in ranks_of(service)} == pids, "neither a pause nor a cancel costs a rank"
    # One process would add in another order, so its runs are others.
    header = bytes(paused.files[max(paused.files)][: 1 << 12].numpy())
    assert b'plan\\": \\"guidance 2 x sequence 1' in header
