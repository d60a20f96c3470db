"""What the gateway takes and what it refuses, field by field."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ovi.common.v1 import generation_pb2, system_pb2
from ovi.gateway.v1 import gateway_pb2 as pb
from services.gateway.images import ImageInfo
from services.gateway.jobs.domain import Submission
from services.gateway.models import ModelInfo
from services.gateway.validation import DEFAULT_AUDIO_NEGATIVE, DEFAULT_VIDEO_NEGATIVE, validate
from shared.errors import InvalidRequest
from shared.memory.modes import VramMode
from shared.sampling_options import SamplingOptions, Solver
from shared.shapes import common_sizes
from shared.variants import PromptFormat


def model(name: str, side: int, num_frames: int, num_layers: int = 30) -> ModelInfo:
    sizes = tuple(common_sizes(side * side))
    form = PromptFormat.AUDIO_LINE
    return ModelInfo(name, sizes, side * side, num_frames, 24, num_layers, form, "bfloat16", "cpu", "f" * 16)


MODELS = {m.id: m for m in (model("960x960_5s", 960, 121), model("960x960_10s", 960, 241), model("tiny", 64, 121, 12))}


def request(**given: object) -> pb.GenerationParameters:
    return pb.GenerationParameters(**({"prompt": "a cat"} | given))


def options(**given: object) -> pb.GenerationParameters:
    return request(options=generation_pb2.SamplingOptions(**given))


def check(parameters: pb.GenerationParameters, *, request_id: str = "", image: ImageInfo | None = None):
    return validate(Submission(request_id=request_id), parameters, MODELS, image, now_s=1000.0)


def test_defaults_are_filled_in():
    wanted = check(request())
    assert wanted.model == "960x960_5s" and (wanted.height, wanted.width, wanted.num_frames) == (960, 960, 121)
    assert wanted.options == SamplingOptions()
    assert wanted.video_negative_prompt == DEFAULT_VIDEO_NEGATIVE
    assert wanted.audio_negative_prompt == DEFAULT_AUDIO_NEGATIVE
    assert wanted.image_id == "" and wanted.vram_mode is VramMode.AUTO


@pytest.mark.parametrize("mode", [mode for mode in VramMode if mode is not VramMode.AUTO])
def test_every_mode_can_be_asked_for_by_its_name(mode):
    number = system_pb2.VramMode.Value(f"VRAM_MODE_{mode.name}")
    assert check(request(vram_mode=number)).vram_mode is mode


def test_a_mode_without_a_name_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        check(request(vram_mode=7))
    (violation,) = caught.value.violations
    assert violation.field == "parameters.vram_mode" and "got 7" in violation.description


def test_a_damaged_model_is_named_with_its_file_and_never_the_default():
    damaged = replace(model("720x720_5s", 720, 121), problem="Ovi/model.safetensors: truncated")
    models = {damaged.id: damaged} | MODELS
    assert validate(Submission(), request(), models, None, now_s=1000.0).model == "960x960_5s"
    with pytest.raises(InvalidRequest) as caught:
        validate(Submission(), request(model=damaged.id), models, None, now_s=1000.0)
    (violation,) = caught.value.violations
    assert violation.field == "parameters.model"
    assert "Ovi/model.safetensors: truncated" in violation.description and "960x960_10s" in violation.description


def test_what_is_given_is_kept():
    given = generation_pb2.SamplingOptions(
        num_inference_steps=1,
        video_guidance_scale=1.0,
        audio_guidance_scale=30.0,
        flow_shift=0.5,
        solver=generation_pb2.SOLVER_EULER,
        slg_layer=0,
        seed=2**32 - 1,
        step_cache_threshold=1.0,
    )
    wanted = check(
        request(model="960x960_10s", video_negative_prompt="", num_frames=241, height=704, width=1280, options=given),
        request_id="A-b_c.9",
    )
    assert wanted.options == SamplingOptions(1, 1.0, 30.0, 0.5, Solver.EULER, 0, 2**32 - 1, 1.0)
    assert wanted.video_negative_prompt == "" and wanted.audio_negative_prompt == DEFAULT_AUDIO_NEGATIVE
    # 704x1280 scaled to 960 x 960 pixels is 711.9 x 1294.5: the same grid point.
    assert (wanted.height, wanted.width, wanted.num_frames) == (704, 1280, 241)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"height": 960, "width": 960}, (960, 960)),
        ({"height": 720, "width": 1280}, (704, 1280)),
        ({"height": 1280, "width": 704}, (1280, 704)),
        ({"height": 70, "width": 60, "model": "tiny"}, (64, 64)),
    ],
)
def test_sizes_within_16_of_the_grid_are_taken(given, expected):
    wanted = check(request(**given))
    assert (wanted.height, wanted.width) == expected


@pytest.mark.parametrize("prompt", ["x", "x" * 5000, "  " + "x" * 5000 + "\n\t ", "日本語 🎬 <S>hi<E>. Audio: rain"])
def test_prompts_that_are_taken(prompt):
    assert check(request(prompt=prompt)).prompt == " ".join(prompt.split())


def test_picture_gives_the_aspect_at_the_area_of_the_model():
    picture = ImageInfo("a" * 64, height=1080, width=1920)
    wanted = check(request(image_id="a" * 64), image=picture)
    assert (wanted.height, wanted.width) == (704, 1280) and wanted.image_id == "a" * 64
    sized = check(request(image_id="a" * 64, height=960, width=960), image=picture)
    assert (sized.height, sized.width) == (960, 960), "a size that is asked for comes before the picture's"


BAD = [
    (request(prompt=""), "parameters.prompt", "0 characters"),
    (request(prompt=" \n\t "), "parameters.prompt", "1 to 5000"),
    (request(prompt="x" * 5001), "parameters.prompt", "5001 characters"),
    (request(prompt="a\0b"), "parameters.prompt", "U+0000"),
    (request(prompt="a\x1b[31m"), "parameters.prompt", "U+001B"),
    (request(video_negative_prompt="x" * 5001), "parameters.video_negative_prompt", "0 to 5000"),
    (request(audio_negative_prompt="\x07"), "parameters.audio_negative_prompt", "U+0007"),
    (request(model="sora"), "parameters.model", "960x960_5s, 960x960_10s, tiny"),
    (request(height=960), "parameters.width", "both height and width"),
    (request(width=960), "parameters.height", "both height and width"),
    (request(height=512, width=512), "parameters.height", "nearest of this aspect is 960x960"),
    (request(height=740, width=1310), "parameters.height", "common are 960x960"),
    (request(height=0, width=0), "parameters.height", "got 0x0"),
    (request(height=2**32 - 1, width=32), "parameters.height", "got 4294967295x32"),
    (request(height=96000, width=32), "parameters.height", "allowed for 960x960_5s"),
    (request(num_frames=120), "parameters.num_frames", "allowed for 960x960_5s is 121"),
    (request(num_frames=241), "parameters.num_frames", "got 241"),
    (request(image_id="nonesuch"), "parameters.image_id", "UploadImage"),
    (request(image_id="../../../etc/passwd"), "parameters.image_id", "UploadImage"),
    (options(num_inference_steps=0), "parameters.options.num_inference_steps", "1 to 1000"),
    (options(num_inference_steps=10001), "parameters.options.num_inference_steps", "got 10001"),
    (options(video_guidance_scale=math.nan), "parameters.options.video_guidance_scale", "got nan"),
    (options(audio_guidance_scale=math.inf), "parameters.options.audio_guidance_scale", "1 to 30"),
    (options(video_guidance_scale=0.99), "parameters.options.video_guidance_scale", "1 to 30"),
    (options(flow_shift=0), "parameters.options.flow_shift", "above 0"),
    (options(seed=-1), "parameters.options.seed", "got -1"),
    (options(seed=2**32), "parameters.options.seed", "0 to 4294967295"),
    (options(slg_layer=30), "parameters.options.slg_layer", "0 (off) to 29"),
    (options(step_cache_threshold=1.5), "parameters.options.step_cache_threshold", "0 (off) to 1"),
    (options(step_cache_threshold=math.nan), "parameters.options.step_cache_threshold", "got nan"),
    (options(solver=9), "parameters.options.solver", "SOLVER_UNIPC"),
]


@pytest.mark.parametrize(("parameters", "field", "said"), BAD)
def test_bad_field_is_named_with_what_came_and_what_is_allowed(parameters, field, said):
    with pytest.raises(InvalidRequest) as refused:
        check(parameters)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert said in refused.value.violations[0].description


@pytest.mark.parametrize("request_id", [" ", "a b", "ä", "x" * 129, "a/b", "a\n"])
def test_bad_request_id(request_id):
    with pytest.raises(InvalidRequest) as refused:
        check(request(), request_id=request_id)
    assert [violation.field for violation in refused.value.violations] == ["request_id"]


def test_every_violation_is_found_at_once():
    together = pb.GenerationParameters()
    for parameters, _, _ in (BAD[0], BAD[5], BAD[7], BAD[8], BAD[17], BAD[19], BAD[21], BAD[24], BAD[25], BAD[30]):
        together.MergeFrom(parameters)
    together.prompt = ""
    with pytest.raises(InvalidRequest) as refused:
        check(together, request_id="?")
    assert {violation.field for violation in refused.value.violations} == {
        "request_id",
        "parameters.prompt",
        "parameters.video_negative_prompt",
        "parameters.model",
        "parameters.width",
        "parameters.image_id",
        "parameters.options.num_inference_steps",
        "parameters.options.video_guidance_scale",
        "parameters.options.flow_shift",
        "parameters.options.seed",
        "parameters.options.solver",
    }


def test_picture_too_narrow_for_the_area_is_refused():
    # 1 x 50000 at 960 x 960 pixels would be a frame of 32 x 214656: seven times the area of the model.
    with pytest.raises(InvalidRequest) as refused:
        check(request(image_id="a" * 64), image=ImageInfo("a" * 64, height=1, width=50_000))
    assert [violation.field for violation in refused.value.violations] == ["parameters.image_id"]
    assert "crop" in refused.value.message


def test_no_model_at_all_is_said():
    with pytest.raises(InvalidRequest, match="none: no model can be run"):
        validate(Submission(), request(), {}, None, now_s=1000.0)
