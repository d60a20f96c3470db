"""Operations over some tokens at a time: the same results, and what they save."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.fusion.attention import sdpa
from services.fusion.kernels.products import linears as joint_linears
from services.fusion.memory.chunks import chunked
from services.fusion.model.config import FusionConfig
from services.fusion.model.fusion import Branch, FusionModel
from services.fusion.model.operations import KV, Ops, TextKV, TowerOps
from services.fusion.packing import pack_projections
from services.fusion.quantization import quantize
from shared.memory.modes import WeightFormat
from tests.interpreted_fusion_kernels import normal
from tests.live_bytes import LiveBytes
from tests.unit.test_fusion_kernels import SMALL, small_model

VIDEO, AUDIO_LENGTH = (48, 3, 6, 10), 13
VIDEO_TOKENS = 45
TOLERANCE = 1e-6
"""Of the largest value, float32: products of fewer rows may add in another order, which a model of three blocks passes
on."""


def _joint(tower: TowerOps) -> TowerOps:
    """The tower with one operation for both cross attentions, and layers side by side as one product."""

    def attend(q_TNK: torch.Tensor, text: TextKV, rotated_q_TNK: torch.Tensor, other: KV) -> torch.Tensor:
        return sdpa(q_TNK, text.k_LNK, text.v_LNK) + sdpa(rotated_q_TNK, *other)

    return replace(tower, joint_attention=attend, linears=joint_linears)


PLAIN = Ops.of(sdpa)
JOINT = Ops(_joint(PLAIN.video), _joint(PLAIN.audio))


@torch.inference_mode()
def _predict(model: FusionModel, ops: Ops) -> list[torch.Tensor]:
    """All four velocities of a step with a clean first frame."""
    texts = [(normal(rows, SMALL.text_dim, seed=rows), normal(rows, SMALL.text_dim, seed=rows)) for rows in (7, 4)]
    positive, negative = model.encode_texts(texts)
    rope = model.rope_tables(VIDEO[1:], AUDIO_LENGTH)
    latents = normal(*VIDEO, seed=1), normal(AUDIO_LENGTH, 20, seed=2)
    branches = [Branch(positive), Branch(negative, skip_layer=1)]
    made = model(*latents, torch.tensor(500.0), branches, rope, ops, clean_first_frame=True)
    return [tensor for velocity in made for tensor in velocity]


@pytest.mark.parametrize("ops", [PLAIN, JOINT], ids=["plain", "joint"])
@pytest.mark.parametrize("weights", WeightFormat)
def test_chunks_change_no_value_beyond_rounding(ops, weights) -> None:
    model = small_model()
    assert isinstance(model, FusionModel)
    quantize(model, weights)
    pack_projections(model)
    whole = _predict(model, ops)
    for tokens in (4, 13, 44):
        for ours, expected in zip(_predict(model, chunked(ops, tokens)), whole, strict=True):
            error = float((ours - expected).abs().max() / expected.abs().max())
            assert error <= TOLERANCE, f"{tokens} tokens at once: {error:.1e}"
    for ours, expected in zip(_predict(model, chunked(ops, VIDEO_TOKENS)), whole, strict=True):
        assert torch.equal(ours, expected), "one chunk is the same work"


def test_no_operation_sees_more_tokens_than_a_chunk() -> None:
    tokens, seen = 16, set()

    def attend(q_TNK: torch.Tensor, k_SNK: torch.Tensor, v_SNK: torch.Tensor) -> torch.Tensor:
        seen.add(("queries", len(q_TNK)))
        return sdpa(q_TNK, k_SNK, v_SNK)

    def linears(layers: tuple[torch.nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.add(("rows", len(x_TD)))
        return PLAIN.video.linears(layers, x_TD)

    def feed_forward(first: torch.nn.Module, second: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
        seen.add(("hidden", len(x_TD)))
        return PLAIN.video.feed_forward(first, second, x_TD)

    tower = replace(Ops.of(attend).video, linears=linears, feed_forward=feed_forward)
    model = small_model()
    assert isinstance(model, FusionModel)
    _predict(model, chunked(Ops(tower, tower), tokens))
    lengths = {16, VIDEO_TOKENS % 16, AUDIO_LENGTH}
    assert seen == {(what, length) for what in ("queries", "rows", "hidden") for length in lengths}


def test_attentions_stay_replaceable_and_towers_take_turns() -> None:
    ops, order = chunked(PLAIN, 4), []
    assert ops.audio.joint_attention is None, "sequence parallelism replaces the audio tower's other_attention"
    assert chunked(JOINT, 4).video.joint_attention is not None
    assert ops.together(lambda: order.append("video") or 1, lambda: order.append("audio") or 2) == (1, 2)
    assert order == ["audio", "video"]


@pytest.mark.parametrize("weights", [WeightFormat.NATIVE, WeightFormat.INT8])
def test_a_feed_forward_by_chunks_holds_a_chunks_hidden_layer(weights) -> None:
    dim, hidden, tokens, length = 32, 512, 8, 203
    config = FusionConfig(dim=dim, ffn_dim=hidden, freq_dim=16, text_dim=24, num_heads=2, num_layers=1, text_len=8)
    with torch.device("meta"):
        model = FusionModel(config)
    quantize(model, weights)
    ffn = model.video_model.blocks[0].ffn
    peaks = []
    for ops in (PLAIN, chunked(PLAIN, tokens)):
        with torch.inference_mode(), LiveBytes() as live:
            ops.video.feed_forward(ffn[0], ffn[2], torch.empty(length, dim, device="meta"))
        peaks.append(live.peak // 4)
    weight = dim * hidden if weights is WeightFormat.INT8 else 0
    # Before and after GELU, or one of them and the result; one layer's weight is scaled back at a time.
    assert peaks[0] == length * dim + max(
        2 * length * hidden, length * (hidden + dim) + weight, length * hidden + weight
    )
    result, chunk = length * dim, tokens * hidden
    assert peaks[1] == length * dim + result + max(2 * chunk, chunk + tokens * dim + weight)
