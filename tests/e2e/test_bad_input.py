"""Everything wrong that a client or a checkpoint folder can hold: named, refused, and the services go on serving."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ovi.common.v1 import generation_pb2 as common_pb
from ovi.gateway.v1 import gateway_pb2 as pb
from shared.errors import EXIT_BAD_CONFIG, InvalidRequest, NotFound, OviError
from shared.grpc_client import error_of
from shared.variants import AUDIO_VAE_FILE, TEXT_ENCODER_FILE, VARIANTS, VIDEO_VAE_FILE, VOCODER_FILE
from tests.e2e.conftest import OVI, SERVICES, Program, RunningStack, start_stack
from tests.service_process import running_service


def options(**fields: Any) -> common_pb.SamplingOptions:
    return common_pb.SamplingOptions(**fields)


BAD_PARAMETERS: list[tuple[str, str, dict[str, Any]]] = [
    ("empty prompt", "prompt", {"prompt": ""}),
    ("blank prompt", "prompt", {"prompt": " \n\t"}),
    ("long prompt", "prompt", {"prompt": "x" * 5001}),
    ("long negative prompt", "video_negative_prompt", {"video_negative_prompt": "x" * 5001}),
    ("long sound negative", "audio_negative_prompt", {"audio_negative_prompt": "x" * 5001}),
    ("unknown model", "model", {"model": "720x720_1h"}),
    ("too large", "height", {"height": 4096, "width": 4096}),
    ("too small", "height", {"height": 1, "width": 1}),
    ("height alone", "width", {"height": 96}),
    ("zero size", "height", {"height": 0, "width": 0}),
    ("other length", "num_frames", {"num_frames": 48}),
    ("no steps", "num_inference_steps", {"options": options(num_inference_steps=0)}),
    ("10001 steps", "num_inference_steps", {"options": options(num_inference_steps=10001)}),
    ("NaN guidance", "video_guidance_scale", {"options": options(video_guidance_scale=math.nan)}),
    ("endless guidance", "audio_guidance_scale", {"options": options(audio_guidance_scale=math.inf)}),
    ("no shift", "flow_shift", {"options": options(flow_shift=0.0)}),
    ("block beyond the last", "slg_layer", {"options": options(slg_layer=4000)}),
    ("step cache above all", "step_cache_threshold", {"options": options(step_cache_threshold=2.0)}),
    ("unknown solver", "solver", {"options": options(solver=99)}),
    ("negative seed", "seed", {"options": options(seed=-1)}),
    ("endless seed", "seed", {"options": options(seed=2**40)}),
    ("unknown picture", "image_id", {"image_id": "no-such-picture"}),
    ("a path as picture", "image_id", {"image_id": "../../../etc/passwd"}),
]


@pytest.fixture(autouse=True)
def still_serving(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test here, whatever it did, every service of the shared stack serves."""
    yield
    if "stack" in request.fixturenames:
        stack: RunningStack = request.getfixturevalue("stack")
        assert all(stack.is_serving(service) for service in SERVICES)


def refusal(call: Callable[[], Any]) -> OviError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    assert "Traceback" not in (raised.value.details() or "")
    return error_of(raised.value)


def create(stack: RunningStack, request_id: str = "", **fields: Any) -> pb.CreateJobResponse:
    parameters = pb.GenerationParameters(**({"prompt": "a bell"} | fields))
    return stack.jobs.CreateJob(pb.CreateJobRequest(request_id=request_id, parameters=parameters), timeout=30)


@pytest.mark.parametrize(
    ("field", "fields"), [row[1:] for row in BAD_PARAMETERS], ids=[row[0] for row in BAD_PARAMETERS]
)
def test_wrong_parameters_are_refused_by_field(stack: RunningStack, field: str, fields: dict[str, Any]) -> None:
    error = refusal(lambda: create(stack, **fields))
    assert isinstance(error, InvalidRequest), error
    named = [violation.field.rpartition(".")[2] for violation in error.violations]
    assert field in named
    assert len(error.message) < 2000, "a message does not send the input back"


def test_all_wrong_fields_are_named_at_once(stack: RunningStack) -> None:
    wrong = options(num_inference_steps=0, seed=-1)
    error = refusal(lambda: create(stack, prompt="", height=1, width=1, options=wrong))
    assert isinstance(error, InvalidRequest)
    named = {violation.field.rpartition(".")[2] for violation in error.violations}
    assert {"prompt", "num_inference_steps", "seed"} <= named and named & {"height", "width"}


def test_a_wrong_request_id_is_refused(stack: RunningStack) -> None:
    for wrong in ("x" * 129, "a b", "../x"):
        error = refusal(lambda wrong=wrong: create(stack, request_id=wrong))
        assert isinstance(error, InvalidRequest) and error.violations[0].field == "request_id"


def test_a_request_id_cannot_be_used_for_something_else(stack: RunningStack) -> None:
    created = create(stack, request_id="order-2", options=options(num_inference_steps=1)).job
    error = refusal(lambda: create(stack, request_id="order-2", prompt="another bell"))
    assert "request_id" in error.message
    stack.finished(created.id)


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def truncated() -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").save(file, "PNG")
    return file.getvalue()[:200]


@pytest.mark.parametrize(
    "picture",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 100, truncated(), bomb(), b"<svg/>"],
    ids=["nothing", "text", "header only", "truncated", "bomb", "svg"],
)
def test_what_is_no_picture_is_refused(stack: RunningStack, picture: bytes) -> None:
    parts = [pb.UploadImageRequest(chunk=picture[i : i + 2**20]) for i in range(0, len(picture), 2**20)]
    assert isinstance(refusal(lambda: stack.jobs.UploadImage(iter(parts), timeout=30)), InvalidRequest)


def test_an_endless_upload_is_cut_off(stack: RunningStack) -> None:
    parts = (pb.UploadImageRequest(chunk=bytes(1 << 20)) for _ in range(40))
    assert isinstance(refusal(lambda: stack.jobs.UploadImage(parts, timeout=60)), InvalidRequest)


@pytest.mark.parametrize("job_id", ["", "nobody", "../../etc/passwd", "x" * 10_000])
def test_unknown_jobs_are_not_found(stack: RunningStack, job_id: str) -> None:
    jobs = stack.jobs
    for error in (
        refusal(lambda: jobs.GetJob(pb.GetJobRequest(id=job_id), timeout=30)),
        refusal(lambda: jobs.CancelJob(pb.CancelJobRequest(id=job_id), timeout=30)),
        refusal(lambda: jobs.DeleteJob(pb.DeleteJobRequest(id=job_id), timeout=30)),
        refusal(lambda: list(jobs.WatchJob(pb.WatchJobRequest(id=job_id), timeout=30))),
        refusal(lambda: list(jobs.DownloadVideo(pb.DownloadVideoRequest(id=job_id), timeout=30))),
    ):
        assert isinstance(error, NotFound | InvalidRequest), error


class _Bomb:
    """Unpickling it makes a file: what a hostile checkpoint could do, harmlessly."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.evidence),)


def _remove(path: Path, evidence: Path) -> None:
    path.unlink()


def _truncate(path: Path, evidence: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def _reshape(path: Path, evidence: Path) -> None:
    safetensors = path.suffix == ".safetensors"
    tensors = load_file(path) if safetensors else torch.load(path, weights_only=True)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = torch.zeros(3, 5, dtype=tensors[name].dtype)
    path.unlink()
    if safetensors:
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _booby_trap(path: Path, evidence: Path) -> None:
    path.unlink()
    torch.save({"weight": _Bomb(evidence)}, path)


FUSION_FILE = VARIANTS["960x960_5s"].file
DAMAGES = [
    ("text_encoder", TEXT_ENCODER_FILE, _booby_trap),
    ("vae", VIDEO_VAE_FILE, _truncate),
    ("vae", AUDIO_VAE_FILE, _reshape),
    ("vae", VOCODER_FILE, _remove),
    ("fusion", FUSION_FILE, _reshape),
]


def _copy(checkpoint: Path, to: Path) -> Path:
    """A folder of hard links: a damage replaces a file, it does not write into it."""
    return Path(shutil.copytree(checkpoint, to, copy_function=os.link))


@pytest.mark.parametrize(("service", "file", "damage"), DAMAGES, ids=[f"{s} {d.__name__}" for s, _, d in DAMAGES])
def test_a_damaged_checkpoint_ends_its_service_and_is_named(
    service: str, file: str, damage: Callable[[Path, Path], None], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, evidence = _copy(tiny_checkpoint, tmp_path / "weights"), tmp_path / "evidence"
    if service == "fusion":  # of several variants the others would be served
        for variant in VARIANTS.values():
            if variant.file != file:
                (folder / variant.file).unlink()
    damage(folder / file, evidence)
    with running_service(service, "--checkpoints", str(folder), "--device", "cpu", serving=False) as started:
        assert started.process.wait(30) == EXIT_BAD_CONFIG, started.log
    reasons = [str(entry["reason"]) for entry in started.log if entry["event"] == "cannot start"]
    assert len(reasons) == 1 and str(folder / file) in reasons[0]
    assert "Traceback" not in str(started.log)
    assert not evidence.exists(), "nothing in the file was run"


def test_a_stack_with_a_damaged_checkpoint_ends_with_the_services_reason(
    tiny_checkpoint: Path, tmp_path: Path, program: Callable[..., Program]
) -> None:
    folder, evidence = _copy(tiny_checkpoint, tmp_path / "weights"), tmp_path / "evidence"
    _booby_trap(folder / TEXT_ENCODER_FILE, evidence)
    arguments = ("--checkpoints", folder, "--data-dir", tmp_path / "data", "--grpc-port", "0", "--http-port", "0")
    command = program(OVI, "up", *arguments)
    assert command.wait() == EXIT_BAD_CONFIG, command.output
    assert str(folder / TEXT_ENCODER_FILE) in command.output
    assert "Ready." not in command.output and "Traceback" not in command.output
    assert not evidence.exists(), "nothing in the file was run"


def test_a_missing_and_a_damaged_variant_are_not_offered_and_the_others_are(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """On a stack of its own, which SIGTERM then stops."""
    folder = _copy(tiny_checkpoint, tmp_path / "weights")
    (folder / VARIANTS["960x960_10s"].file).unlink()
    _truncate(folder / FUSION_FILE, tmp_path)
    running = start_stack(tmp_path / "data", "--checkpoints", folder)
    try:
        offered = [model.id for model in running.models.ListModels(pb.ListModelsRequest(), timeout=30).models]
        assert set(offered) == set(VARIANTS) - {"960x960_10s", "960x960_5s"}
        line = running.program.line_with("960x960_5s is not offered: ")
        assert str(folder / FUSION_FILE) in line
        for absent in ("960x960_10s", "960x960_5s"):
            error = refusal(lambda absent=absent: create(running, model=absent))
            assert isinstance(error, InvalidRequest)
            assert error.violations[0].field.endswith("model") and offered[0] in error.message
        assert running.finished(running.create("served all the same", steps=1).id).state == pb.JOB_STATE_COMPLETED
        running.stop(signal.SIGTERM)
    finally:
        running.close()
