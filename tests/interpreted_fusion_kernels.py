"""The kernels of the fusion model, run by Triton's interpreter on a CPU, against the reference operations.

`TRITON_INTERPRET=1 python -m tests.interpreted_fusion_kernels CHECK`. A process of its own, since Triton reads that
variable once, when it is first imported.
"""

from __future__ import annotations

import sys

import torch

from services.fusion import kernels
from services.fusion.model import operations
from services.fusion.model.layers import Affine, Rope
from services.fusion.ops import select_ops
from services.fusion.quantization import FP8, quantize_rows

FLOAT32_TOLERANCE = 2e-5
"""Sums of some hundred products of order 1 in another order."""


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_norm_rope() -> None:
    wide = normal(5, 3 * 48, seed=1)
    x, weight = wide[:, 48:96], normal(48, seed=2)
    angles = normal(5, 1, 12, seed=3)
    rope = Rope(torch.polar(torch.ones_like(angles), angles))
    ours, expected = (module.norm_and_rope(x, weight, rope, 2) for module in (kernels, operations))
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=FLOAT32_TOLERANCE, rtol=0)
    assert torch.equal(kernels.norm_rope(x, weight, rope, 2), ours[1])


def check_residual_norms() -> None:
    x, y = normal(7, 48, seed=1), normal(7, 48, seed=2)
    one = Affine(normal(1, 48, seed=3), normal(1, 48, seed=4))
    two = Affine(normal(2, 48, seed=5), normal(2, 48, seed=6))
    gates = (None, normal(1, 48, seed=7), normal(2, 48, seed=8))
    cases = [(None, None, affines) for affines in ((one,), (two,))]
    cases += [(y, gate, affines) for gate in gates for affines in ((), (one,), (two, one))]
    for other, gate, affines in cases:
        ours, expected = (module.residual_norms(x, other, gate, 3, affines) for module in (kernels, operations))
        torch.testing.assert_close(ours, expected, atol=FLOAT32_TOLERANCE, rtol=0)


def check_joint_attention() -> None:
    q, rotated = normal(131, 2, 32, seed=1), normal(131, 2, 32, seed=2)
    packed = normal(65, 2 * 64, seed=5)
    other = packed[:, :64].unflatten(1, (2, 32)), packed[:, 64:].unflatten(1, (2, 32))
    attention = select_ops(torch.device("cpu"), torch.float32).ops.video
    # Of 90 rows the last 80, 26, none are padding, which is one row repeated.
    for num_rows, bound in ((10, 64), (64, 64), (90, 90)):
        text = [normal(90, 2, 32, seed=seed) for seed in (3, 4)]
        for tensor in text:
            tensor[num_rows:] = tensor[num_rows : num_rows + 1]
        text_kv = operations.TextKV(*text, torch.tensor(num_rows, dtype=torch.int32), bound)
        expected = attention.attend_jointly(q, text_kv, rotated, other)
        ours = kernels.joint_attention(q, text_kv, rotated, other)
        torch.testing.assert_close(ours, expected, atol=FLOAT32_TOLERANCE, rtol=0)


def check_quantize() -> None:
    # Numbers of the type itself: the interpreter's conversion loses carries when it rounds.
    x = normal(5, 80, seed=1).mul(100).to(FP8).float()
    x[:, 7] = 448
    x[2] = 0
    values, scale = kernels.quantize_rows(x * 0.5)
    expected, expected_scale = quantize_rows(x * 0.5)
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    _, scale = kernels.quantize_gelu_rows(x)
    _, expected_scale = quantize_rows(torch.nn.functional.gelu(x, approximate="tanh"))
    torch.testing.assert_close(scale, expected_scale, atol=0, rtol=1e-5)


def check_heads() -> None:
    q, k, packed = normal(5, 6, 8, seed=1), normal(5, 6, 8, seed=2), normal(5, 2 * 48, seed=3)
    v = packed[:, 48:].unflatten(1, (6, 8))
    for degree in (2, 3):
        ours, expected = (module.pack_heads(q, k, v, degree) for module in (kernels, operations))
        assert torch.equal(ours, expected)
        assert torch.equal(ours[1, :, 2].flatten(1), v[:, 6 // degree : 2 * (6 // degree)].flatten(1))
        back = ours[:, :, 1].contiguous()
        assert torch.equal(kernels.unpack_heads(back), operations.unpack_heads(back))
        assert torch.equal(operations.unpack_heads(back), k)


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()
