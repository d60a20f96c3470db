"""Matrix products of several layers at once, or with what follows them."""

from __future__ import annotations

import torch

from services.fusion.model import operations
from services.fusion.packing import joint_rows
from services.fusion.quantization import QuantizedLinear


def linears(layers: tuple[torch.nn.Module, ...], x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """See Linears; layers whose weights lie side by side (see services.fusion.packing) are one product."""
    plain = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    weight, bias = joint_rows([layer.weight for layer in plain]), joint_rows([layer.bias for layer in plain])
    if len(plain) < len(layers) or weight is None or bias is None:
        return tuple(layer(x_TD) for layer in layers)
    out_TD = torch.nn.functional.linear(x_TD, weight, bias)
    return out_TD.split([layer.out_features for layer in plain], dim=-1)


def feed_forward(linear_in: torch.nn.Module, linear_out: torch.nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """See FeedForward; the activation is applied as the first product's result leaves the chip."""
    if isinstance(linear_in, QuantizedLinear):
        weight = linear_in.weight_in(x_TD.dtype)
    elif isinstance(linear_in, torch.nn.Linear):
        weight = linear_in.weight
    else:
        return operations.feed_forward(linear_in, linear_out, x_TD)
    hidden = torch.ops.aten._addmm_activation(linear_in.bias, x_TD, weight.t(), use_gelu=True)
    del weight
    return linear_out(hidden)
