"""The Triton kernels, interpreted on the CPU, against the reference operations; packing."""

from __future__ import annotations

import os

import pytest
import torch

from services.fusion.checkpoint import build, layout
from services.fusion.model.config import FusionConfig
from services.fusion.ops import Kernels, select_ops
from services.fusion.packing import joint_rows, pack_projections
from tests.warm_start import start_warm

SMALL = FusionConfig(dim=48, ffn_dim=80, freq_dim=16, text_dim=24, num_heads=2, num_layers=3, text_len=8)
TIMEOUT_S = 120


@pytest.mark.parametrize("check", ["norm_rope", "residual_norms", "joint_attention", "quantize", "heads"])
def test_kernel_is_its_reference(check) -> None:
    """In a process in which Triton interprets: it decides so when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = start_warm("tests.interpreted_fusion_kernels", [check], environment)
    said = process.stderr.read()
    assert process.wait(TIMEOUT_S) == 0, said


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    shapes = layout(SMALL).items()
    return build(SMALL, {key: torch.randn(shape, generator=generator).mul(0.2).to(dtype) for key, (_, shape) in shapes})


def test_packing_moves_weights_and_changes_none() -> None:
    model, expected = small_model(), small_model().state_dict()
    own = model.video_model.blocks[1].self_attn
    assert joint_rows([own.q.weight, own.k.weight]) is None
    pack_projections(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    joint = joint_rows([own.q.weight, own.k.weight, own.v.weight])
    assert joint is not None
    assert torch.equal(joint, torch.cat([own.q.weight, own.k.weight, own.v.weight]))


def test_fused_kernels_are_refused_where_they_cannot_run() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        select_ops(torch.device("cpu"), torch.float32, Kernels.FUSED)
