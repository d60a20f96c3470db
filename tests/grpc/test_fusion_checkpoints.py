"""Checkpoints of a denoise over the wire: another process goes on to the bit, pause, refusals, what is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import grpc
import pytest
import torch

from ovi.common.v1 import generation_pb2, system_pb2, tensor_pb2
from ovi.fusion.v1 import fusion_pb2 as pb
from ovi.fusion.v1 import fusion_pb2_grpc as pb_grpc
from services.fusion.sampling.control import LONGEST_WAIT_S
from shared.errors import ReferenceLost
from shared.tensors.service import TensorServer
from shared.tensors.store import TensorStore
from shared.tensors.transport import TensorResolver
from tests.fusion_checkpoint import SMALL, write_variant
from tests.service_process import ServiceProcess, running_service

MODEL = "720x720_5s"
TIMEOUT_S = 90
STEPS, EVERY = 10, 3
FIRST = EVERY - 1
"""After so many steps a checkpoint comes, and then again: it travels while one more is made."""
MAX_BYTES = 1 << 28


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fusion")
    write_variant(folder, MODEL, seed=1)
    return folder


@pytest.fixture(scope="module")
def service(checkpoints) -> Iterator[ServiceProcess]:
    with running_service("fusion", "--checkpoints", str(checkpoints), "--grace-s", "1") as service:
        yield service


@pytest.fixture
def stub(service) -> Iterator[pb_grpc.FusionServiceStub]:
    with service.channel() as channel:
        stub = pb_grpc.FusionServiceStub(channel)
        yield stub
        assert stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S).num_pending == 0


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


class Caller:
    """Makes Denoise calls and fetches what they give."""

    def __init__(self, producer: TensorServer, resolver: TensorResolver) -> None:
        self._producer = producer
        self.resolver = resolver

    def publish(self, tensor: torch.Tensor) -> tensor_pb2.TensorRef:
        return self._producer.publish(self._producer.store.put(tensor))

    def request(self, *, picture: bool = False, run_id: str = "", **options) -> pb.DenoiseRequest:
        generator = torch.Generator().manual_seed(5)
        rows = [self.publish(torch.randn(6, SMALL.text_dim, generator=generator)) for _ in range(3)]
        wanted = {"num_inference_steps": STEPS, "slg_layer": 1, "seed": 7} | options
        first = self.publish(torch.randn(48, 1, 4, 4, generator=generator)) if picture else None
        return pb.DenoiseRequest(
            model=MODEL,
            height=64,
            width=64,
            options=generation_pb2.SamplingOptions(**wanted),
            prompt=rows[0],
            video_negative=rows[1],
            audio_negative=rows[2],
            first_frame_latent=first,
            run_id=run_id,
            checkpoint_steps=EVERY,
        )

    def fetch(self, ref: tensor_pb2.TensorRef) -> torch.Tensor:
        tensor = self.resolver.fetch(ref, field="state", max_bytes=MAX_BYTES)
        self.resolver.release(ref)
        return tensor

    def run(self, stub, request: pb.DenoiseRequest) -> Made:
        made = Made()
        for event in stub.Denoise(request, timeout=TIMEOUT_S):
            made.add(event, self)
        return made

    def latents(self, result: pb.Result) -> list[torch.Tensor]:
        return [self.fetch(result.video_latent), self.fetch(result.audio_latent)]


class Made:
    """What came of a call so far."""

    def __init__(self) -> None:
        self.begun = pb.Begun()
        self.kinds: list[str] = []
        self.steps: list[int] = []
        self.files: dict[int, torch.Tensor] = {}
        """Checkpoints, by the steps that they save."""
        self.latents: list[torch.Tensor] = []
        self.vram_mode = system_pb2.VRAM_MODE_UNSPECIFIED

    def add(self, event: pb.DenoiseResponse, caller: Caller) -> None:
        kind = event.WhichOneof("event")
        self.kinds.append(kind)
        if kind == "begun":
            self.begun = event.begun
        elif kind == "step":
            self.steps.append(event.step.index)
        elif kind == "checkpoint":
            with contextlib.suppress(ReferenceLost):  # withdrawn at the end of the run
                self.files[event.checkpoint.steps_done] = caller.fetch(event.checkpoint.state)
        elif kind == "result":
            self.latents = caller.latents(event.result)
            self.vram_mode = event.result.vram_mode


@pytest.fixture(scope="module")
def caller(producer, resolver) -> Caller:
    return Caller(producer, resolver)


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.parametrize("picture", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize(
    "solver", [generation_pb2.SOLVER_UNIPC, generation_pb2.SOLVER_DPMPP, generation_pb2.SOLVER_EULER]
)
def test_a_run_goes_on_from_each_of_its_checkpoints(stub, caller, solver, picture) -> None:
    request = caller.request(picture=picture, solver=solver)
    whole = caller.run(stub, request)
    assert whole.steps == list(range(1, STEPS + 1)) and whole.kinds[0] == "begun" and whole.kinds[-1] == "result"
    assert list(whole.files) == [2, 4, 6, 8], "each is waited for"
    for steps_done, file in whole.files.items():
        request.checkpoint.CopyFrom(caller.publish(file))
        rest = caller.run(stub, request)
        assert rest.begun == pb.Begun(steps_done=steps_done)
        assert rest.steps == list(range(steps_done + 1, STEPS + 1))
        assert_same(rest.latents, whole.latents)


def test_a_process_killed_three_times_and_another_that_ends_the_work(checkpoints, stub, caller) -> None:
    request = caller.request(picture=True, num_inference_steps=100)
    whole = caller.run(stub, request)
    done: list[int] = []
    for _ in range(3):
        with running_service("fusion", "--checkpoints", str(checkpoints)) as victim, victim.channel() as channel:
            made = Made()
            with pytest.raises(grpc.RpcError):
                for event in pb_grpc.FusionServiceStub(channel).Denoise(request, timeout=TIMEOUT_S):
                    made.add(event, caller)
                    if made.files:
                        os.kill(victim.process.pid, signal.SIGKILL)
        assert made.begun == pb.Begun(steps_done=done[-1] if done else 0)
        done.append(max(made.files))
        assert made.steps[0] == made.begun.steps_done + 1
        assert made.steps[-1] <= done[-1] + EVERY
        request.checkpoint.CopyFrom(caller.publish(made.files[done[-1]]))
    assert done == sorted(set(done)), "each went on further"
    rest = caller.run(stub, request)
    assert rest.steps == list(range(done[-1] + 1, 101))
    assert_same(rest.latents, whole.latents)


def test_the_worst_moment_for_a_kill_costs_no_more_than_was_allowed(checkpoints, stub, caller) -> None:
    """The reader has kept the first checkpoint; the second is with it, but not kept yet, and the worker dies."""
    request = caller.request(num_inference_steps=100)
    flags = ("--checkpoints", str(checkpoints), "--log-level", "debug")
    kept, made = 0, Made()
    with running_service("fusion", *flags) as victim, victim.channel() as channel:
        victim_stub = pb_grpc.FusionServiceStub(channel)
        call = victim_stub.Denoise(request, timeout=TIMEOUT_S)
        for event in call:
            if kept and event.WhichOneof("event") == "checkpoint":
                break
            made.add(event, caller)
            kept = max(made.files, default=0)
        assert kept == FIRST and event.checkpoint.steps_done == 2 * FIRST
        assert next(call).step.index == kept + EVERY
        for _ in range(50):  # time enough for many steps
            assert victim_stub.DescribeModel(pb.DescribeModelRequest(), timeout=TIMEOUT_S).num_pending == 1
        victim.process.kill()
        victim.process.wait(TIMEOUT_S)
    logged = [entry["index"] for entry in victim.log if entry["event"] == "step"]
    assert logged == list(range(1, kept + EVERY + 1))
    request.checkpoint.CopyFrom(caller.publish(made.files[kept]))
    rest = caller.run(stub, request)
    assert rest.steps == list(range(kept + 1, 101))
    request.ClearField("checkpoint")
    assert_same(rest.latents, caller.run(stub, request).latents)


def test_weights_in_int8(stub, caller) -> None:
    request = caller.request()
    request.vram_mode = system_pb2.VRAM_MODE_ULTRA_LOW
    whole = caller.run(stub, request)
    request.checkpoint.CopyFrom(caller.publish(whole.files[FIRST]))
    rest = caller.run(stub, request)
    assert rest.begun.steps_done == FIRST
    assert_same(rest.latents, whole.latents)
    # What was made in a lower mode, since memory ran out, goes on there unless another one was asked for.
    request.vram_mode = system_pb2.VRAM_MODE_UNSPECIFIED
    lowered = caller.run(stub, request)
    assert lowered.begun.steps_done == FIRST and lowered.vram_mode == system_pb2.VRAM_MODE_ULTRA_LOW
    assert_same(lowered.latents, whole.latents)
    request.vram_mode = system_pb2.VRAM_MODE_STANDARD
    other = caller.run(stub, request)
    assert "another" in other.begun.checkpoint_refused and "weights" in other.begun.checkpoint_refused
    assert other.steps[0] == 1 and not torch.equal(other.latents[0], whole.latents[0])


def test_with_the_step_cache_a_run_goes_on_from_a_computed_step(stub, caller) -> None:
    # The first block's output changes so much that some steps are reused and some are not.
    request = caller.request(step_cache_threshold=1, num_inference_steps=16)
    request.checkpoint_steps = 2
    whole = caller.run(stub, request)
    assert whole.files
    for steps_done, file in whole.files.items():
        request.checkpoint.CopyFrom(caller.publish(file))
        rest = caller.run(stub, request)
        assert rest.begun.steps_done == steps_done and rest.steps[0] == steps_done + 1
        assert_same(rest.latents, whole.latents)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda request, file: setattr(request.options, "seed", 8), "another seed"),
        (lambda request, file: setattr(request.options, "flow_shift", 4.0), "another flow_shift"),
        (lambda request, file: request.prompt.CopyFrom(request.video_negative), "another inputs"),
        (lambda request, file: file[5000:5001].bitwise_xor_(1), "damaged"),
    ],
)
def test_what_cannot_be_used_is_told_and_the_run_begins_at_its_first_step(stub, caller, change, says) -> None:
    request = caller.request()
    file = caller.run(stub, request).files[FIRST].clone()
    change(request, file)
    request.checkpoint.CopyFrom(caller.publish(file))
    made = caller.run(stub, request)
    assert says in made.begun.checkpoint_refused and made.begun.steps_done == 0
    assert made.steps == list(range(1, STEPS + 1))
    request.ClearField("checkpoint")
    assert_same(made.latents, caller.run(stub, request).latents)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ref: ref.spec.MergeFrom(tensor_pb2.TensorSpec(num_bytes=1 << 40)), "checkpoint.spec.num_bytes"),
        (lambda ref: setattr(ref, "address", "192.0.2.7:1"), "checkpoint.address"),
        (lambda ref: setattr(ref, "tensor_id", "gone"), "not held here"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_is_done_without(stub, caller, change, says) -> None:
    request = caller.request()
    request.checkpoint.CopyFrom(caller.publish(torch.zeros(64, dtype=torch.uint8)))
    change(request.checkpoint)
    made = caller.run(stub, request)
    assert says in made.begun.checkpoint_refused and made.steps == list(range(1, STEPS + 1))


def test_one_at_a_time_and_none_is_left_behind(stub, caller) -> None:
    request = caller.request()
    begun_s = time.monotonic()
    events = list(stub.Denoise(request, timeout=TIMEOUT_S))
    assert LONGEST_WAIT_S <= time.monotonic() - begun_s < 2 * LONGEST_WAIT_S, "it was waited for, once"
    (given,) = (event.checkpoint for event in events if event.WhichOneof("event") == "checkpoint")
    assert given.steps_done == FIRST, "the first was never released, so no other was made"
    with pytest.raises(ReferenceLost):
        caller.fetch(given.state)
    request.checkpoint_steps = 0
    assert "checkpoint" not in caller.run(stub, request).kinds


@pytest.mark.parametrize("seen", ["step", "checkpoint"])
def test_a_cancel_while_a_checkpoint_is_taken_leaves_nothing_behind(stub, caller, seen) -> None:
    request = caller.request(num_inference_steps=1000)
    request.checkpoint_steps = 1
    call = stub.Denoise(request, timeout=TIMEOUT_S)
    for event in call:
        if event.WhichOneof("event") == seen:
            call.cancel()
            break
    begun_s = time.monotonic()
    request.options.num_inference_steps = 2
    made = caller.run(stub, request)  # comes through long before 1000 steps could have ended
    assert made.steps == [1, 2] and time.monotonic() - begun_s < LONGEST_WAIT_S, "nobody waits for who is gone"
    if seen == "checkpoint":
        with pytest.raises(ReferenceLost):
            caller.fetch(event.checkpoint.state)


def test_pause_gives_a_checkpoint_and_frees_the_device(stub, caller) -> None:
    request = caller.request(picture=True, run_id="job_1")
    request.checkpoint_steps = 0
    whole = caller.run(stub, request)
    made = Made()
    waiting = caller.request(run_id="job_2", num_inference_steps=1000)
    for event in stub.Denoise(request, timeout=TIMEOUT_S):
        made.add(event, caller)
        if made.steps == [1, 2] and made.kinds[-1] == "step":
            later = stub.Denoise(waiting, timeout=TIMEOUT_S)
            assert not stub.PauseRun(pb.PauseRunRequest(run_id="job_2"), timeout=TIMEOUT_S).running, "it waits"
            assert not stub.PauseRun(pb.PauseRunRequest(run_id="job_3"), timeout=TIMEOUT_S).running, "nobody knows it"
            assert stub.PauseRun(pb.PauseRunRequest(run_id="job_1"), timeout=TIMEOUT_S).running
    assert made.kinds[-2:] == ["checkpoint", "paused"] and not made.latents
    assert next(later).WhichOneof("event") == "begun", "the device is free for another run"
    later.cancel()
    (steps_done,) = made.files
    assert steps_done == made.steps[-1] < STEPS
    request.checkpoint.CopyFrom(caller.publish(made.files[steps_done]))
    rest = caller.run(stub, request)
    assert rest.steps == list(range(steps_done + 1, STEPS + 1))
    assert_same(rest.latents, whole.latents)
    assert not stub.PauseRun(pb.PauseRunRequest(run_id="job_1"), timeout=TIMEOUT_S).running, "it has ended"


@pytest.mark.parametrize("run_id", ["", "a b", "x" * 65, "../.."])
def test_a_bad_run_id_names_the_field(stub, caller, run_id) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.PauseRun(pb.PauseRunRequest(run_id=run_id), timeout=TIMEOUT_S)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "run_id" in caught.value.details()
    if run_id:
        with pytest.raises(grpc.RpcError) as caught:
            caller.run(stub, caller.request(run_id=run_id))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "run_id" in caught.value.details()
