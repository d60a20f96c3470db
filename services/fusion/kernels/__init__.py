"""Implementations for CUDA that do in one pass over memory what the reference operations do in several.

Statistics, rotation and softmax are in float32; each result is rounded once. See model.operations for the functions.
"""

from services.fusion.kernels.heads import JOINT_HEAD_DIMS, joint_attention, pack_heads, unpack_heads
from services.fusion.kernels.products import feed_forward, linears
from services.fusion.kernels.rows import (
    norm_and_rope,
    norm_rope,
    quantize_gelu_rows,
    quantize_rows,
    residual_norms,
)

__all__ = [
    "JOINT_HEAD_DIMS",
    "feed_forward",
    "joint_attention",
    "linears",
    "norm_and_rope",
    "norm_rope",
    "pack_heads",
    "quantize_gelu_rows",
    "quantize_rows",
    "residual_norms",
    "unpack_heads",
]
