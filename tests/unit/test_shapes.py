"""Latent and size arithmetic against figures of the release."""

import pytest

from shared.shapes import AudioLatentShape, VideoLatentShape, common_sizes, legal_size, snap_size
from shared.variants import VARIANTS


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "expected"),
    [(121, 736, 704, (48, 31, 46, 44)), (241, 960, 960, (48, 61, 60, 60)), (1, 64, 32, (48, 1, 4, 2))],
)
def test_video_latent_and_back(num_frames, height, width, expected) -> None:
    shape = VideoLatentShape.from_pixels(num_frames, height, width)
    assert shape.as_tuple() == expected
    assert (shape.num_frames, shape.pixel_height, shape.pixel_width) == (num_frames, height, width)


@pytest.mark.parametrize("bad", [(120, 64, 64), (0, 64, 64), (121, 48, 64), (121, 64, 0)])
def test_impossible_video_shapes_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="must be"):
        VideoLatentShape.from_pixels(*bad)


def test_audio_lengths_of_the_release() -> None:
    assert [AudioLatentShape.from_seconds(s).length for s in (5, 10)] == [157, 314]
    with pytest.raises(ValueError, match="multiple of 5"):
        AudioLatentShape.from_seconds(7)


def test_variants_have_the_released_lengths() -> None:
    lengths = {v.id: (v.num_frames, v.audio_shape.length) for v in VARIANTS.values()}
    assert lengths["720x720_5s"] == (121, 157)
    assert lengths["960x960_10s"] == (241, 314)


def test_halves_round_to_even() -> None:
    assert snap_size(720, 720, 720 * 720) == (704, 704)  # 22.5 -> 22
    assert snap_size(1, 1000, 96 * 96)[0] == 32


@pytest.mark.parametrize("area", [96 * 96, 720 * 720, 960 * 960])
def test_snapping_is_idempotent_for_every_common_size(area) -> None:
    for size in common_sizes(area):
        assert snap_size(*size, area) == size
        assert legal_size(*size, area) == size


@pytest.mark.parametrize(
    ("size", "expected"),
    [((720, 1280), (704, 1280)), ((960, 960), (960, 960)), ((1080, 1920), None), ((704, 704), None), ((1, 1), None)],
)
def test_legal_sizes_need_rounding_only(size, expected) -> None:
    assert legal_size(*size, 960 * 960) == expected
