"""The fp8 tier: products of the wide layers in float8 (e4m3) with a scale for every row. Lossy, so opt-in.

Rows of the activations are scaled as they come, rows of the weights once. The first and the last block, embeddings,
text keys and values, modulation and heads keep their precision. Where the device has no fp8 products the weights alone
are stored in fp8 and multiplied in the activations' precision.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from services.fusion.model.block import TowerBlock
from services.fusion.model.fusion import FusionModel
from services.fusion.model.operations import FeedForward, Linears
from services.fusion.packing import joint_rows

FP8 = torch.float8_e4m3fn


class Quantization(enum.Enum):
    """Of the wide layers' products; NONE is the only lossless one."""

    NONE = "none"
    FP8 = "fp8"


LARGEST = torch.finfo(FP8).max
SMALLEST_AMAX = 1e-12
_PARTS = ("weight", "scale_O1", "bias")

QuantizeRows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x_TD -> values_TD in e4m3, scales (T, 1) float32 with x = values * scale."""


def quantize_rows(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of QuantizeRows: each row is scaled so that its largest value is the largest of e4m3."""
    scale_T1 = x_TD.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST_AMAX) / LARGEST
    return (x_TD.float() / scale_T1).to(FP8), scale_T1


class Fp8Linear(nn.Module):
    """A Linear whose weight (out, in) is held in e4m3 with a scale for each output row."""

    weight: torch.Tensor
    scale_O1: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale_O1 = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale_O1", scale_O1)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The product in the precision of x, with the weight scaled back."""
        return F.linear(x_TD, (self.weight.to(x_TD.dtype) * self.scale_O1).to(x_TD.dtype), self.bias)


def has_fp8_products(device: torch.device) -> bool:
    """True on Ada, Hopper and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Operations:
    """Linears and FeedForward for a quantized model on a device with fp8 products; other layers go the usual way."""

    def __init__(
        self, quantize_rows: QuantizeRows, quantize_gelu_rows: QuantizeRows, linears: Linears, feed_forward: FeedForward
    ) -> None:
        """
        Args:
            quantize_rows: of the activations.
            quantize_gelu_rows: the same, after GELU (tanh form).
            linears: of layers that are not quantized.
            feed_forward: of layers that are not quantized.
        """
        self._quantize_rows = quantize_rows
        self._quantize_gelu_rows = quantize_gelu_rows
        self._linears = linears
        self._feed_forward = feed_forward

    def linears(self, layers: tuple[nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Linears; the rows are quantized once, and layers side by side are one product."""
        if not isinstance(layers[0], Fp8Linear):
            return self._linears(layers, x_TD)
        rows = self._quantize_rows(x_TD)
        weight, scale_O1, bias = (joint_rows([getattr(layer, name) for layer in layers]) for name in _PARTS)
        if weight is None or scale_O1 is None or bias is None:
            return tuple(_product(rows, layer.weight, layer.scale_O1, layer.bias) for layer in layers)  # type: ignore[arg-type]
        return _product(rows, weight, scale_O1, bias).split([len(layer.weight) for layer in layers], dim=-1)  # type: ignore[arg-type]

    def feed_forward(self, linear_in: nn.Module, linear_out: nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        if not isinstance(linear_out, Fp8Linear):
            return self._feed_forward(linear_in, linear_out, x_TD)
        (hidden,) = self.linears((linear_in,), x_TD)
        rows = self._quantize_gelu_rows(hidden)
        return _product(rows, linear_out.weight, linear_out.scale_O1, linear_out.bias)


def _product(
    rows: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, scale_O1: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """x W^T + b in bfloat16."""
    values_TD, scale_T1 = rows
    return torch._scaled_mm(
        values_TD,
        weight.t(),
        scale_a=scale_T1,
        scale_b=scale_O1.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def quantize(model: FusionModel) -> None:
    """Replace the wide layers of all blocks but the first and the last."""
    for tower in (model.video_model, model.audio_model):
        for block in list(tower.blocks)[1:-1]:
            assert isinstance(block, TowerBlock)
            own, cross = block.self_attn, block.cross_attn
            for module, names in (
                (own, ("q", "k", "v", "o")),
                (cross, ("q", "o", "k_fusion", "v_fusion")),
                (block.ffn, ("0", "2")),
            ):
                for name in names:
                    setattr(module, name, Fp8Linear(getattr(module, name)))
