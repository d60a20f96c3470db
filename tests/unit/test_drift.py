"""The drift benchmark: its figures, and that each variant is what it says."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.common import Clip, random_model
from benchmarks.drift import DEFAULT, VARIANTS, Bench, Drift, measure, parse_variants, soften
from benchmarks.fusion import Subject
from services.fusion.model.config import FusionConfig
from services.fusion.ops import select_ops
from services.fusion.parallel.plan import ParallelPlan

CONFIG = FusionConfig(dim=48, ffn_dim=64, freq_dim=32, text_dim=24, num_heads=4, num_layers=3, text_len=16)
CLIP = Clip(frames=3, height=8, width=6, audio_length=11)
CPU = torch.device("cpu")
STEPS = 6


def test_error_and_cosine_of_a_known_angle() -> None:
    theirs = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    turned = 2 * torch.tensor([[math.cos(0.1), math.sin(0.1)], [0.0, 0.0]])
    longer = 1.5 * theirs
    drift = Drift.between([(theirs, theirs), (turned, theirs), (longer, theirs)])
    assert drift.cosine == pytest.approx(math.cos(0.1)), "the widest angle"
    assert drift.error == pytest.approx(0.5), "the largest error"
    assert Drift.between([(turned, theirs)]).error == pytest.approx(2 * math.sin(0.05)), "a chord"


def test_variants_are_named_or_refused() -> None:
    assert list(parse_variants("fp8; attention", 1)) == ["attention", "fp8"], "fp8 last: it changes the model"
    assert list(parse_variants("", 2)) == list(VARIANTS)
    assert "plan" not in parse_variants("", 1)
    with pytest.raises(ValueError, match=r"got \['plan'\], allowed on 1 ranks are \['attention'"):
        parse_variants("plan", 1)


@torch.inference_mode()
def test_what_each_variant_drifts_by() -> None:
    model = random_model(CONFIG, CPU, torch.float32)
    soften(model)
    plan = ParallelPlan.auto(1, CONFIG.num_heads)
    bench = Bench(Subject.make(model, CLIP, CPU), select_ops(CPU, torch.float32), plan, None)
    rows = {row.variant: row for row in measure("clip", bench, parse_variants("", 1), STEPS)}
    errors = {
        name: (
            row.prediction_video_error,
            row.prediction_audio_error,
            row.final_video_error,
            row.final_audio_error,
        )
        for name, row in rows.items()
    }
    assert errors[DEFAULT] == (0, 0, 0, 0) and rows[DEFAULT].gain == 1
    assert max(errors["attention"]) < 1e-5, "float32: only the order of sums differs"
    assert rows["cache 0.3"].steps_reused == STEPS - 2, "softened steps resemble each other"
    for name in ("cache 0.3", "fp8"):
        assert min(errors[name]) > 1e-5 and max(errors[name]) < 0.2, name
    for row in rows.values():
        # The distance is at least the sine of the angle, and 1 - cos is at most its square; cosines are rounded.
        assert row.final_video_cosine >= 1 - row.final_video_error**2 - 1e-9
