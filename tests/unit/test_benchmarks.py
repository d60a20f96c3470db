"""What the benchmarks compute from what they measure: time of collectives, operations of a step, plans."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import collectives, spans
from benchmarks.common import Clip, Rates, count_flop, random_model
from benchmarks.fusion import parse_plans, step_work
from benchmarks.stack import busy_spans
from services.fusion.model.config import FusionConfig
from services.fusion.model.fusion import Branch
from services.fusion.model.operations import Ops
from services.fusion.parallel.plan import ParallelPlan
from shared.memory.modes import WeightFormat

CONFIG = FusionConfig(dim=48, ffn_dim=64, freq_dim=32, text_dim=24, num_heads=4, num_layers=3, text_len=16)
CLIP = Clip(frames=3, height=8, width=6, audio_length=11)


def test_collective_times_agree_with_counting_every_microsecond() -> None:
    draw = random.Random(0)
    for _ in range(50):
        spans = [[(begin := draw.randrange(90), begin + draw.randrange(1, 9)) for _ in range(6)] for _ in range(2)]
        busy, others = ({moment for begin, end in kind for moment in range(begin, end)} for kind in spans)
        found = collectives.measure(*spans)
        assert found.total_s * 1e6 == pytest.approx(len(busy))
        assert found.exposed_s * 1e6 == pytest.approx(len(busy - others))


def test_overlap_is_what_working_side_by_side_saves() -> None:
    draw = random.Random(1)
    for _ in range(50):
        groups = [[(begin := draw.randrange(90), begin + draw.randrange(1, 9)) for _ in range(4)] for _ in range(3)]
        busy = [{moment for begin, end in group for moment in range(begin, end)} for group in groups]
        assert spans.overlapped(groups) == sum(map(len, busy)) - len(set().union(*busy))


def test_work_on_a_job_is_found_in_the_logs() -> None:
    entries = [
        {"event": "denoised", "request_id": "job_a", "seconds": 2.0, "timestamp": "2026-01-01T00:00:05Z"},
        {"event": "denoised", "request_id": "job_b", "seconds": 1.0, "timestamp": "2026-01-01T00:00:06Z"},
        {"event": "clip decoded", "request_id": "job_a", "seconds": 0.5, "timestamp": "2026-01-01T00:00:06.250Z"},
        {"event": "listening", "timestamp": "2026-01-01T00:00:00Z"},
    ]
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert busy_spans(entries, "job_a", begin) == {"denoise": [(3.0, 5.0)], "decode": [(5.75, 6.25)]}


def plain_attention(q_TNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor) -> torch.Tensor:
    """In products that torch's counter knows on every device."""
    scores_NTS = torch.einsum("tnk,snk->nts", q_TNK, k_SNK) * q_TNK.shape[-1] ** -0.5
    return torch.einsum("nts,snk->tnk", scores_NTS.softmax(-1), v_SNK)


def torchs_count(config: FusionConfig) -> int:
    """Operations of one pass by torch's own counter."""
    model = random_model(config, torch.device("cpu"), torch.float32)
    (text,) = model.encode_texts([(torch.randn(5, config.text_dim), torch.randn(5, config.text_dim))])
    rope = model.rope_tables((CLIP.frames, CLIP.height, CLIP.width), CLIP.audio_length)
    video, audio = torch.randn(48, CLIP.frames, CLIP.height, CLIP.width), torch.randn(CLIP.audio_length, 20)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(video, audio, torch.tensor(500.0), [Branch(text)], rope, Ops.of(plain_attention))
    return counter.get_total_flops()


def test_counted_operations_of_blocks_agree_with_torchs_counter() -> None:
    deep, shallow = CONFIG, replace(CONFIG, num_layers=1)
    counted = sum(count_flop(deep, CLIP)) - sum(count_flop(shallow, CLIP))
    assert counted == torchs_count(deep) - torchs_count(shallow)


def test_floor_is_that_of_the_busiest_rank() -> None:
    rates = Rates(1e12, attention_flop_per_s=1e12, copy_bytes_per_s=1e12, fp8_product_flop_per_s=2e12)
    one_pass = sum(count_flop(CONFIG, CLIP)) / 1e12
    alone_tflop, alone_s = step_work(CONFIG, CLIP, ParallelPlan(1, 1), rates, WeightFormat.NATIVE)
    assert alone_tflop == pytest.approx(one_pass * 5 / 3), "the negative pass leaves out one of three layers"
    assert alone_s == pytest.approx(alone_tflop)
    guided_tflop, guided_s = step_work(CONFIG, CLIP, ParallelPlan(2, 2), rates, WeightFormat.NATIVE)
    assert guided_tflop == alone_tflop
    assert guided_s == pytest.approx(one_pass / 2)
    products, _ = count_flop(CONFIG, CLIP)
    _, fp8_s = step_work(CONFIG, CLIP, ParallelPlan(2, 1), rates, WeightFormat.FP8)
    assert fp8_s == pytest.approx(one_pass - products / 1e12 / 6), "one of three layers takes half the time"


def test_plans_of_other_numbers_of_ranks_are_refused() -> None:
    assert parse_plans("auto,1x4,1x1", 4, 24) == [ParallelPlan(2, 2), ParallelPlan(1, 4), ParallelPlan(1, 1)]
    with pytest.raises(ValueError, match="2x4 needs 8 ranks, there are 4"):
        parse_plans("2x4", 4, 24)
