"""The counts of tensors in shared.memory.estimate, counted again on the model itself, without data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.fusion.memory.chunks import chunked
from services.fusion.model.config import RELEASED
from services.fusion.model.fusion import Branch, FusionModel, RopeTables, TextCache
from services.fusion.model.layers import Rope
from services.fusion.model.operations import Ops, TextKV, TowerOps
from services.fusion.parallel.groups import Group
from services.fusion.parallel.sequence import SequenceParallelModel
from shared.memory.estimate import FusionLayout, estimate_fusion
from shared.memory.modes import WeightFormat
from shared.memory.sizes import RELEASED_FUSION, ClipTokens
from tests.live_bytes import LiveBytes

LAYERS = 3
CONFIG = replace(RELEASED, num_layers=LAYERS)
SHAPE = (48, 31, 60, 60)
CLIP = ClipTokens(31 * 30 * 30, 157, passes=2)
META = torch.device("meta")


def joint_linears(layers, x_TD):
    """One product of layers side by side, as on a GPU."""
    return x_TD.new_empty(len(x_TD), sum(len(layer.weight) for layer in layers)).split(
        [len(layer.weight) for layer in layers], dim=-1
    )


def heads_of(x_TD, weight_D, rope, num_heads):
    return torch.empty_like(x_TD).unflatten(-1, (num_heads, -1))


def residual_norms(x_TD, y_TD, gate_RD, clean, affines):
    sum_TD = x_TD if y_TD is None else torch.empty_like(x_TD)
    return sum_TD, tuple(torch.empty_like(x_TD) for _ in affines)


def feed_forward(linear_in, linear_out, x_TD):
    hidden = x_TD.new_empty(len(x_TD), len(linear_in.weight))
    return hidden.new_empty(x_TD.shape)


def fp8_feed_forward(linear_in, linear_out, x_TD):
    """As services.fusion.quantization does it: the hidden values, then the same in fp8, then the product."""
    hidden = x_TD.new_empty(len(x_TD), len(linear_in.weight))
    rows = hidden.new_empty(hidden.shape, dtype=torch.float8_e4m3fn)
    return rows.new_empty(x_TD.shape, dtype=x_TD.dtype)


def shapes_only(feed_forward=feed_forward) -> Ops:
    """Operations that take the memory of the fused ones and do nothing."""
    tower = TowerOps(
        self_attention=lambda q, k, v: torch.empty_like(q),
        text_attention=lambda q, k, v: torch.empty_like(q),
        other_attention=lambda q, k, v: torch.empty_like(q),
        joint_attention=lambda q, text, rotated, other: torch.empty_like(q),
        norm_rope=heads_of,
        norm_and_rope=lambda x, weight, rope, heads: (
            heads_of(x, weight, rope, heads),
            heads_of(x, weight, rope, heads),
        ),
        residual_norms=residual_norms,
        linears=joint_linears,
        feed_forward=feed_forward,
    )
    return Ops(tower, replace(tower, joint_attention=None))


class AloneInGroup(Group):
    """One of several ranks, whose exchanges bring memory and no data."""

    def exchange(self, sent, send_sizes, receive_sizes):
        return sent.new_empty(sum(receive_sizes))

    def gather(self, x):
        return x.new_empty(self.size, *x.shape)

    def gather_rows(self, x, sizes):
        return x.new_empty(sum(sizes), *x.shape[1:])


def texts(passes: int) -> list[Branch]:
    def kv() -> TextKV:
        k, v = (torch.empty(512, 24, 128, dtype=torch.bfloat16, device=META) for _ in range(2))
        return TextKV(k, v, torch.empty((), dtype=torch.int32, device=META), 127)

    caches = [TextCache(*(tuple(kv() for _ in range(LAYERS)) for _ in range(2))) for _ in range(passes)]
    return [Branch(cache, skip_layer=index) for index, cache in enumerate(caches)]


@torch.inference_mode()
def peak_bytes(ops: Ops, passes: int, ranks: int = 1) -> int:
    with META:
        model: torch.nn.Module = FusionModel(CONFIG).to(torch.bfloat16)
        if ranks > 1:
            model = SequenceParallelModel(model, AloneInGroup(None, 0, ranks))
        rope = RopeTables(*(Rope(torch.empty(n, 1, 64, dtype=torch.complex64)) for n in (CLIP.video, CLIP.audio)))
        latents = torch.empty(SHAPE), torch.empty(CLIP.audio, 20), torch.empty(())
    branches = texts(passes)
    with LiveBytes() as live:
        model(*latents, branches, rope, ops)
    return live.peak


def estimated_bytes(layout: FusionLayout, passes: int, ranks: int = 1) -> int:
    """What the step's tensors take; those of the latents and rotations are there before."""
    sizes = replace(RELEASED_FUSION, num_layers=LAYERS)
    components = estimate_fusion(sizes, replace(CLIP, passes=passes), layout, ranks)
    before = (CLIP.video + CLIP.audio) * (5 * 192 * 4 + 64 * 8)
    return components.by_name["activations"] - before


NATIVE = FusionLayout(WeightFormat.NATIVE, LAYERS, None, keep_ends=False)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resident(passes: int, ranks: int) -> None:
    assert estimated_bytes(NATIVE, passes, ranks) == pytest.approx(peak_bytes(shapes_only(), passes, ranks), rel=0.05)


@pytest.mark.parametrize("tokens", [8192, 2048])
@pytest.mark.parametrize("passes", [1, 2])
def test_in_chunks(tokens: int, passes: int) -> None:
    peak = peak_bytes(chunked(shapes_only(), tokens), passes)
    assert estimated_bytes(replace(NATIVE, token_chunk=tokens), passes) == pytest.approx(peak, rel=0.04)


def test_fp8() -> None:
    peak = peak_bytes(shapes_only(fp8_feed_forward), 2)
    assert estimated_bytes(replace(NATIVE, weights=WeightFormat.FP8), 2) == pytest.approx(peak, rel=0.04)
