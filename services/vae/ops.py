"""Which implementations of the video decoder's operations a device gets, and the fused ones."""

from __future__ import annotations

import enum
import importlib.util
from typing import Any

import torch
from torch.nn import functional as F

from services.vae.model.video_layers import (
    PIXEL_CHANNELS,
    TAPS,
    Carried,
    Causal,
    Form,
    Ops,
    Raw,
    ReferenceOps,
    Role,
    Shortcut,
    TimeDoubler,
    Upsampler,
)


class Kernels(enum.Enum):
    """A switch: all compute the same function, `reference` in plain PyTorch."""

    AUTO = "auto"
    REFERENCE = "reference"
    FUSED = "fused"


def select_ops(device: torch.device, kernels: Kernels = Kernels.AUTO) -> Ops:
    """Fused operations where they can run: on CUDA with Triton.

    Raises:
        ValueError: fused kernels are asked for where they cannot run.
    """
    can_fuse = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if kernels is Kernels.FUSED and not can_fuse:
        raise ValueError(f"fused kernels need CUDA and Triton; the device is {device}")
    if kernels is Kernels.REFERENCE or not can_fuse:
        return ReferenceOps()
    from services.vae import kernels as triton_kernels

    return FusedOps(triton_kernels)


class FusedOps:
    """cuDNN convolutions on buffers that Triton kernels fill; see `kernels` for what a kernel does in its pass.

    - Over time: a convolution sees its past in front of its input, or, where frames come in pairs, uses four products
      for two frames. In the first step the past is zero and only the last tap of time counts.
    - Upsampling: nearest doubling and 3x3 are four 2x2 convolutions of the small picture, one for each phase, made in
      one call; the next pass reads them interleaved.
    - The last convolution has few channels: it is one matrix product with all taps, summed where they look.
    """

    name = "fused"

    def __init__(self, kernels: Any, *, latent_frames_per_step: int = 2) -> None:
        """
        Args:
            kernels: the module `services.vae.kernels`, which needs Triton.
            latent_frames_per_step: more fill the GPU better at the small levels and take more memory.
        """
        self._kernels = kernels
        self.latent_frames_per_step = latent_frames_per_step

    def causal_weights(self, weight_OIFHW: torch.Tensor, role: Role) -> tuple[torch.Tensor, ...]:
        if role is Role.SINGLE:
            return (weight_OIFHW,)
        if role is Role.LAST:
            return (weight_OIFHW.permute(2, 3, 4, 0, 1).flatten(0, 3).contiguous(),)
        first, middle, last = weight_OIFHW.unbind(2)
        return first, (first + middle + last) / 2, (first - middle + last) / 2, last

    def upsample_weights(self, weight_OIHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        phases = [_merge_taps(_merge_taps(weight_OIHW, 2, below), 3, right) for below in range(2) for right in range(2)]
        return (torch.cat(phases),)

    def join(
        self, raw: Raw, shortcut: Shortcut | None, following: Causal | None, carried: Carried, *, keep: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        shape, first = _shape(raw), raw.parts[0]
        halo, (frames, height, width, channels) = carried.halo, shape
        own = slice(halo, height + halo)
        sum_FHWC = first.new_empty(shape) if keep else None
        target = fed = past_2HWC = None
        padded = (height + 2 * halo, width, channels)
        if following is not None:
            past_2HWC = carried.states.get(following.index) if following.role is Role.SEVERAL else None
            if past_2HWC is not None:
                fed = first.new_empty(TAPS + 1, frames // 2, *padded)
                target = fed[:, :, own]
            else:
                past = carried.states.get(following.index) if following.role is Role.SINGLE else None
                num_past = 0 if past is None else len(past)
                fed = first.new_empty(num_past + frames, *padded)
                if past is not None:
                    fed[:num_past] = past
                target = fed[num_past:, own]
        gamma_C = None if following is None else following.gamma_C
        self._kernels.join(raw.parts, raw.form, raw.bias_C, shortcut, gamma_C, sum_FHWC, target, past_2HWC, shape)
        if following is not None and fed is not None:
            carried.fill_halo(fed.flatten(0, 1) if past_2HWC is not None else fed[-frames:])
            if past_2HWC is None:
                _keep_past(fed, own, following, carried)
        return sum_FHWC, fed

    def convolve(self, causal: Causal, fed: torch.Tensor, carried: Carried) -> Raw:
        rows = carried.padding()
        if causal.role is Role.LAST:
            taps_TP = torch.mm(causal.weights[0], fed.flatten(0, 2).t())
            return Raw((taps_TP.unflatten(1, fed.shape[:-1]),), Form.TAPS, causal.bias_C)
        if carried.first:
            last = causal.weights[-1] if causal.role is Role.SEVERAL else causal.weights[0][:, :, -1]
            return Raw((_convolve_pictures(fed, last, (rows, 1)),), Form.WHOLE, causal.bias_C)
        if causal.role is Role.SEVERAL:
            parts = zip(fed, causal.weights, strict=True)
            products = tuple(_convolve_pictures(part, weight, (rows, 1)) for part, weight in parts)
            return Raw(products, Form.PAIRS, causal.bias_C)
        return Raw((_convolve_frames(fed, causal.weights[0], (0, rows, 1)),), Form.WHOLE, causal.bias_C)

    def double_time(self, doubler: TimeDoubler, x_FHWC: torch.Tensor, carried: Carried) -> torch.Tensor:
        past = carried.states.get(doubler.index)
        if past is None:
            past = x_FHWC.new_zeros(TAPS - 1, *x_FHWC.shape[1:])
        x_FHWC = torch.cat([past, x_FHWC])
        carried.states[doubler.index] = x_FHWC[1 - TAPS :].clone()
        y_FHWC = _convolve_frames(x_FHWC, doubler.weight, (0, 0, 0)) + doubler.bias_C
        return y_FHWC.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def upsample(self, upsampler: Upsampler, x_FHWC: torch.Tensor, carried: Carried) -> Raw:
        phases = _convolve_pictures(carried.with_halo(x_FHWC), upsampler.weights[0], (carried.padding(), 1))
        return Raw((phases,), Form.PHASES, upsampler.bias_C)

    def attend(self, q_FSC: torch.Tensor, k_FSC: torch.Tensor, v_FSC: torch.Tensor) -> torch.Tensor:
        if q_FSC.device.type != "cuda" or q_FSC.dtype == torch.float32:
            return F.scaled_dot_product_attention(q_FSC[:, None], k_FSC[:, None], v_FSC[:, None])[:, 0]
        # The flash kernels end at a head of 256; these products reach the matrix units with any.
        scores_FSS = torch.bmm(q_FSC, k_FSC.transpose(1, 2), out_dtype=torch.float32) * q_FSC.shape[-1] ** -0.5
        return torch.bmm(scores_FSS.softmax(-1).to(v_FSC.dtype), v_FSC)

    def pixels(self, last: Causal, raw: Raw, dtype: torch.dtype, carried: Carried) -> torch.Tensor:
        taps_TFHW = raw.parts[0]
        _, frames, rows, width = taps_TFHW.shape
        side = round((len(last.bias_C) / PIXEL_CHANNELS) ** 0.5)
        sides = side * (rows - 2 * carried.halo), side * width
        out_FHWC = torch.empty(frames, *sides, PIXEL_CHANNELS, dtype=dtype, device=taps_TFHW.device)
        before_TFHW = carried.states.get(last.index)
        self._kernels.pixels(taps_TFHW, before_TFHW, last.bias_C, carried.halo, out_FHWC)
        carried.states[last.index] = taps_TFHW[:, 1 - TAPS :].contiguous()
        return out_FHWC


def _shape(raw: Raw) -> tuple[int, int, int, int]:
    frames, height, width, channels = raw.parts[0].shape
    if raw.form is Form.PAIRS:
        return 2 * frames, height, width, channels
    if raw.form is Form.PHASES:
        return frames, 2 * (height - 1), 2 * (width - 1), channels // 4
    return frames, height, width, channels


def _keep_past(fed: torch.Tensor, own: slice, following: Causal, carried: Carried) -> None:
    """Keep the last two frames: with halo in front of single frames, own rows only where combinations are made."""
    if following.role is Role.LAST:
        return
    past = fed if following.role is Role.SINGLE else fed[:, own]
    if len(past) < TAPS - 1:
        past = torch.cat([torch.zeros_like(past), past])
    carried.states[following.index] = past[1 - TAPS :].contiguous()


def _merge_taps(weight: torch.Tensor, dim: int, phase: int) -> torch.Tensor:
    """Three taps on a doubled picture as two on the picture itself, for its even (0) or odd (1) pixels."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], dim)


def _convolve_pictures(x_NHWC: torch.Tensor, weight_OIHW: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    return _convolve(x_NHWC.permute(0, 3, 1, 2), weight_OIHW, padding).permute(0, 2, 3, 1).contiguous()


def _convolve_frames(x_FHWC: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int, int]) -> torch.Tensor:
    return _convolve(x_FHWC.permute(3, 0, 1, 2)[None], weight, padding)[0].permute(1, 2, 3, 0).contiguous()


def _convolve(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """Without bias. On CUDA cuDNN's own choice of algorithm, whatever the process's settings are.

    Trying algorithms out gained nothing at 960x960 and 2 % at 720x720, for up to 8 s at the first clip of every size.
    """
    ones = [1] * len(padding)
    if x.device.type != "cuda":
        return torch.convolution(x, weight, None, ones, padding, ones, False, [0] * len(padding), 1)
    return torch.cudnn_convolution(x, weight, padding, ones, ones, 1, False, False, False)
