"""Wide layers of the blocks held in 8 bits, with a scale for every row of a weight. Lossy, so opt-in.

int8: the weights alone; they are multiplied in the activations' precision. Of all blocks.
fp8 (e4m3): rows of the activations are scaled as they come, and products are made in fp8. The first and the last block
keep their precision. Where the device has no fp8 products the weights alone are in fp8, as with int8.

Embeddings, text keys and values, modulation and heads keep their precision in both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from services.fusion.model.block import TowerBlock
from services.fusion.model.fusion import FusionModel
from services.fusion.model.operations import FeedForward, Linears
from services.fusion.packing import joint_rows
from shared.memory.modes import WeightFormat

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
"""Of FP8."""
SMALLEST_AMAX = 1e-12
_LARGEST_INT8 = 127
_PARTS = ("weight", "scale_O1", "bias")

QuantizeRows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x_TD -> values_TD in 8 bits, scales (T, 1) float32 with x = values * scale."""


def quantize_rows(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """QuantizeRows to e4m3: each row is scaled so that its largest value is the largest of the type."""
    scale_T1 = _row_scales(x_TD, LARGEST)
    return torch.div(x_TD, scale_T1).to(FP8), scale_T1


def quantize_rows_int8(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """QuantizeRows to int8, symmetric: the largest value of a row becomes 127 or -127."""
    scale_T1 = _row_scales(x_TD, _LARGEST_INT8)
    return torch.div(x_TD, scale_T1).round_().to(torch.int8), scale_T1


def _row_scales(x_TD: torch.Tensor, largest: float) -> torch.Tensor:
    return x_TD.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST_AMAX) / largest


_QUANTIZE_WEIGHT: dict[WeightFormat, QuantizeRows] = {
    WeightFormat.FP8: quantize_rows,
    WeightFormat.INT8: quantize_rows_int8,
}


class QuantizedLinear(nn.Module):
    """A Linear whose weight (out, in) is held in e4m3 or int8 with a float32 scale for each output row."""

    weight: torch.Tensor
    scale_O1: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: nn.Linear, weights: WeightFormat) -> None:
        """
        Args:
            linear: the layer it stands for.
            weights: FP8 or INT8.
        """
        super().__init__()
        weight, scale_O1 = _QUANTIZE_WEIGHT[weights](linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale_O1", scale_O1)
        self.register_buffer("bias", linear.bias.detach())

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight scaled back, each value rounded once: the only copy that a product needs, for as long as it runs.

        Scaling the product instead would be no more exact, as it rounds the product once more, and dearer: there are
        more video tokens than columns in a weight, and bias and GELU could no longer be applied on the chip.
        """
        if self.weight.dtype is torch.int8:
            return torch.mul(self.weight, self.scale_O1, out=self.weight.new_empty(self.weight.shape, dtype=dtype))
        # fp8 mixes with no other type; in the wider one its values are the same.
        return self.weight.to(dtype).mul_(self.scale_O1)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The product in the precision of x."""
        return F.linear(x_TD, self.weight_in(x_TD.dtype), self.bias)


def has_fp8_products(device: torch.device) -> bool:
    """True on Ada, Hopper and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Operations:
    """Linears and FeedForward for fp8 layers on a device with fp8 products; other layers go the usual way."""

    def __init__(
        self, quantize_rows: QuantizeRows, quantize_gelu_rows: QuantizeRows, linears: Linears, feed_forward: FeedForward
    ) -> None:
        """
        Args:
            quantize_rows: of the activations.
            quantize_gelu_rows: the same, after GELU (tanh form).
            linears: of layers that are not in fp8.
            feed_forward: of layers that are not in fp8.
        """
        self._quantize_rows = quantize_rows
        self._quantize_gelu_rows = quantize_gelu_rows
        self._linears = linears
        self._feed_forward = feed_forward

    def linears(self, layers: tuple[nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Linears; the rows are quantized once, and layers side by side are one product."""
        if not _is_fp8(layers[0]):
            return self._linears(layers, x_TD)
        rows = self._quantize_rows(x_TD)
        weight, scale_O1, bias = (joint_rows([getattr(layer, name) for layer in layers]) for name in _PARTS)
        if weight is None or scale_O1 is None or bias is None:
            return tuple(_product(rows, layer.weight, layer.scale_O1, layer.bias) for layer in layers)  # type: ignore[arg-type]
        return _product(rows, weight, scale_O1, bias).split([len(layer.weight) for layer in layers], dim=-1)  # type: ignore[arg-type]

    def feed_forward(self, linear_in: nn.Module, linear_out: nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        if not _is_fp8(linear_out):
            return self._feed_forward(linear_in, linear_out, x_TD)
        (hidden,) = self.linears((linear_in,), x_TD)
        rows = self._quantize_gelu_rows(hidden)
        return _product(rows, linear_out.weight, linear_out.scale_O1, linear_out.bias)  # type: ignore[arg-type]


def _is_fp8(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLinear) and layer.weight.dtype is FP8


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


def is_quantized(index: int, num_layers: int, weights: WeightFormat) -> bool:
    """Whether block `index` of `num_layers` is quantized: in int8 all are, in fp8 all but the first and the last."""
    if weights is WeightFormat.FP8:
        return 0 < index < num_layers - 1
    return weights is WeightFormat.INT8


def quantize_block(block: TowerBlock, weights: WeightFormat) -> None:
    """Replace the wide layers of one tower's block, where they are; one after the other.

    Args:
        block: with its values in place.
        weights: FP8 or INT8.
    """
    own, cross = block.self_attn, block.cross_attn
    for module, names in (
        (own, ("q", "k", "v", "o")),
        (cross, ("q", "o", "k_fusion", "v_fusion")),
        (block.ffn, ("0", "2")),
    ):
        for name in names:
            setattr(module, name, QuantizedLinear(getattr(module, name), weights))


def quantize(model: FusionModel, weights: WeightFormat) -> None:
    """Replace the wide layers of every block that `is_quantized`; none for NATIVE."""
    for tower in (model.video_model, model.audio_model):
        for index, block in enumerate(tower.blocks):
            assert isinstance(block, TowerBlock)
            if is_quantized(index, len(tower.blocks), weights):
                quantize_block(block, weights)
