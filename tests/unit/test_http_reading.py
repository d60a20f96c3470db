"""Reading what HTTP clients send: variants by length and size, data URLs, keys, loosely typed fields."""

from __future__ import annotations

import base64

import pytest
from starlette.requests import Request

from services.gateway.http.bodies import request_id_of
from services.gateway.http.reading import FieldReader
from services.gateway.http.uploads import MAX_DATA_URL_CHARACTERS, picture_of_data_url
from services.gateway.http.variants import choose_variant
from services.gateway.models import ModelInfo
from shared.errors import InvalidRequest
from shared.shapes import common_sizes
from shared.variants import PromptFormat


def model(name: str, area: int, num_frames: int, problem: str = "") -> ModelInfo:
    sizes = tuple(common_sizes(area))
    return ModelInfo(name, sizes, area, num_frames, 24, 30, PromptFormat.AS_IS, "bfloat16", "cuda:0", "f", problem)


MODELS = {
    one.id: one
    for one in (
        model("720x720_5s", 720 * 720, 121),
        model("960x960_5s", 960 * 960, 121),
        model("960x960_10s", 960 * 960, 241),
        model("960x960_20s", 960 * 960, 481, problem="truncated"),
    )
}


def chosen(
    model_id: str = "", seconds: int | None = None, size: tuple[int, int] | None = None
) -> tuple[str, dict[str, str]]:
    """The variant, and what is wrong by field."""
    wrong: dict[str, str] = {}
    choice = choose_variant(
        MODELS,
        model_id=model_id,
        seconds=seconds,
        size=size,
        on_seconds=lambda what: wrong.update(seconds=what),
        on_size=lambda what: wrong.update(size=what),
        show_size=lambda height, width: f"{width}x{height}",
    )
    return choice, wrong


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, "720x720_5s"),
        ({"seconds": 5}, "720x720_5s"),
        ({"seconds": 10}, "960x960_10s"),
        ({"size": (960, 960)}, "960x960_5s"),
        ({"size": (704, 1280)}, "960x960_5s"),
        ({"size": (1280, 704), "seconds": 10}, "960x960_10s"),
        ({"size": (720, 720), "seconds": 5}, "720x720_5s"),
        ({"model_id": "960x960_5s", "seconds": 5}, "960x960_5s"),
        ({"model_id": "unknown", "seconds": 7}, "unknown"),
    ],
)
def test_the_first_variant_that_makes_it(wanted, expected):
    assert chosen(**wanted) == (expected, {})


@pytest.mark.parametrize(
    ("wanted", "field", "said"),
    [
        ({"seconds": 20}, "seconds", "got 20, allowed is 5 or 10"),
        ({"seconds": 10, "model_id": "960x960_5s"}, "seconds", "allowed for 960x960_5s is 5"),
        ({"size": (720, 720), "seconds": 10}, "size", "960x960"),
        ({"size": (1, 1)}, "size", "704x704"),
        ({"size": (1080, 1920)}, "size", "got 1920x1080"),
    ],
)
def test_what_none_makes_is_refused_with_what_there_is(wanted, field, said):
    _, wrong = chosen(**wanted)
    assert list(wrong) == [field]
    assert said in wrong[field]


def test_data_urls():
    data = b"\x89PNG"
    text = base64.b64encode(data).decode()
    for head in ("data:image/png;base64,", "data:;base64,", "data:image/svg+xml;charset=utf-8;base64,"):
        assert picture_of_data_url(head + text, field="image") == data
    for wrong in ("data:image/png," + text, "data:image/png;base64,***", "data:" + "a" * 200 + ";base64,", "nothing"):
        with pytest.raises(InvalidRequest) as refused:
            picture_of_data_url(wrong, field="image")
        assert refused.value.violations[0].field == "image"
    with pytest.raises(InvalidRequest, match="at most"):
        picture_of_data_url("data:;base64," + "A" * MAX_DATA_URL_CHARACTERS, field="image")


def test_keys_become_request_ids():
    def of(key: str, longest: int = 128) -> str:
        return request_id_of(Request({"type": "http", "headers": [(b"idempotency-key", key.encode())]}), longest)

    assert of("plain-1.a_b") == "plain-1.a_b" and of("") == ""
    assert of("a b") != of("a/b") and of("a b") == of("a b") and len(of("a b")) <= 100
    assert of("k" * 101, longest=100) != of("k" * 102, longest=100), "two long ones stay two"
    with pytest.raises(InvalidRequest):
        of("k" * 256)


def test_numbers_may_be_texts_and_everything_wrong_is_kept():
    fields = {"a": "5", "b": 2.0, "c": "x", "d": True, "e": float("inf"), "f": None, "g": 2.5, "h": "1e3", "i": 10**400}
    reader = FieldReader(fields, prefix="options.")
    assert (reader.whole("a", 1, 9), reader.whole("b", 1, 9), reader.number("h")) == (5, 2, 1000.0)
    assert reader.whole("f", 1, 9) is None and reader.whole("absent", 1, 9) is None and not reader.violations
    wrong = ("c", "d", "e", "g", "i")
    for name in wrong:
        assert reader.whole(name, 1, 9) is None
    assert [violation.field for violation in reader.violations] == [f"options.{name}" for name in wrong]
    with pytest.raises(InvalidRequest):
        reader.check()
