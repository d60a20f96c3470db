"""The Wan2.2 video decoder as a stream: latent frames in, pictures out, the past carried in between.

Source: Wan (arXiv 2503.20314) section 4. Shapes as in `video_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from services.vae.model.video_layers import (
    Carried,
    Causal,
    Ops,
    Raw,
    Role,
    Shortcut,
    Stripe,
    TimeDoubler,
    Upsampler,
    rms_norm,
)


@dataclass(frozen=True)
class Linear:
    """A 1x1 convolution."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_OI, self.bias_O)


@dataclass(frozen=True)
class Residual:
    """Two causal convolutions beside a shortcut."""

    first: Causal
    second: Causal
    shortcut: Linear | None
    """None: the input itself."""


@dataclass(frozen=True)
class Attention:
    """Attention over the pixels of each frame, one head."""

    gamma_C: torch.Tensor
    qkv: Linear
    proj: Linear


@dataclass(frozen=True)
class Level:
    """Residual blocks at one size, then the way to the next."""

    residuals: tuple[Residual, ...]
    doubler: TimeDoubler | None
    upsampler: Upsampler | None
    """None: the last level."""


class VideoDecoder:
    """The decoder half of an AutoencoderKLWan, with weights laid out for `ops`."""

    def __init__(self, network: Any, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            network: an AutoencoderKLWan in its residual form with float32 weights; they are shared, if they fit as they
                are, and never changed.
            ops: implementations of the operations.
            device: where it shall run.
            dtype: of its arithmetic.
        """
        builder = _Builder(ops, device, dtype)
        decoder = network.decoder
        self._ops = ops
        self._post_quant = builder.linear(network.post_quant_conv)
        self._conv_in = builder.causal(decoder.conv_in, None)
        self._mid_first, self._mid_second = (builder.residual(block) for block in decoder.mid_block.resnets)
        self._attention = builder.attention(decoder.mid_block.attentions[0])
        self._levels = tuple(builder.level(block) for block in decoder.up_blocks)
        self._conv_out = builder.causal(decoder.conv_out, decoder.norm_out, Role.LAST)

    @property
    def ops(self) -> Ops:
        """Implementations of the operations."""
        return self._ops

    def stream(
        self, latent_FHWC: torch.Tensor, dtype: torch.dtype, stripe: Stripe | None = None
    ) -> Iterator[torch.Tensor]:
        """Pictures (f, 16H, 16W, 3), step by step: one of the first latent frame, four of every further one.

        A step takes `Ops.latent_frames_per_step` latent frames, whatever the caller does with the pictures.

        Args:
            latent_FHWC: as the network was trained to see it, on the device, in the dtype of its arithmetic.
            dtype: of the pictures: torch.uint8 for levels 0 to 255, else values in [-1, 1].
            stripe: which rows these are, if not the whole picture; the pictures then hold its rows.
        """
        carried = Carried(stripe)
        latent_FHWC = self._post_quant(latent_FHWC)
        yield self._step(latent_FHWC[:1], dtype, carried)
        carried.first = False
        for part_FHWC in latent_FHWC[1:].split(self._ops.latent_frames_per_step):
            if len(part_FHWC):
                yield self._step(part_FHWC, dtype, carried)

    def _step(self, latent_FHWC: torch.Tensor, dtype: torch.dtype, carried: Carried) -> torch.Tensor:
        _, raw = self._feed(Raw((latent_FHWC,)), None, self._conv_in, carried, keep=False)
        x_FHWC, raw = self._feed(raw, None, self._mid_first.first, carried)
        x_FHWC, _ = self._residual(self._mid_first, x_FHWC, raw, None, carried)
        x_FHWC, raw = self._attend(x_FHWC, self._mid_second.first, carried)
        x_FHWC, raw = self._residual(self._mid_second, x_FHWC, raw, self._levels[0].residuals[0].first, carried)
        followers = [*(level.residuals[0].first for level in self._levels[1:]), self._conv_out]
        for level, following in zip(self._levels, followers, strict=True):
            x_FHWC, raw = self._level(level, x_FHWC, raw, following, carried)
        return self._ops.pixels(self._conv_out, raw, dtype, carried)

    def _feed(
        self, raw: Raw, shortcut: Shortcut | None, following: Causal | None, carried: Carried, *, keep: bool = True
    ) -> tuple[Any, Any]:
        """The finished frames of `raw` (None unless `keep`), and what the convolution after them makes of them."""
        x_FHWC, fed = self._ops.join(raw, shortcut, following, carried, keep=keep)
        return x_FHWC, None if following is None else self._ops.convolve(following, fed, carried)

    def _residual(
        self, block: Residual, x_FHWC: torch.Tensor, raw: Raw, following: Causal | None, carried: Carried
    ) -> tuple[Any, Any]:
        """`raw` is what the block's first convolution has made of `x_FHWC`."""
        shortcut = Shortcut(x_FHWC if block.shortcut is None else block.shortcut(x_FHWC))
        _, raw = self._feed(raw, None, block.second, carried, keep=False)
        keep = following is None or following.role is not Role.LAST
        return self._feed(raw, shortcut, following, carried, keep=keep)

    def _attend(self, x_FHWC: torch.Tensor, following: Causal, carried: Carried) -> tuple[Any, Any]:
        attention = self._attention
        channels = x_FHWC.shape[-1]
        q_FHWC, kv_FHWC = attention.qkv(rms_norm(x_FHWC, attention.gamma_C)).split([channels, 2 * channels], dim=-1)
        if carried.stripe is not None:
            kv_FHWC = carried.stripe.gather_rows(kv_FHWC.contiguous())
        k_FSC, v_FSC = kv_FHWC.flatten(1, 2).chunk(2, dim=-1)
        mixed_FSC = self._ops.attend(q_FHWC.flatten(1, 2), k_FSC, v_FSC)
        raw = Raw((attention.proj(mixed_FSC).view(x_FHWC.shape),))
        return self._feed(raw, Shortcut(x_FHWC), following, carried)

    def _level(
        self, level: Level, x_FHWC: torch.Tensor, raw: Raw, following: Causal, carried: Carried
    ) -> tuple[Any, Any]:
        begun_FHWC = x_FHWC
        after_last = following if level.upsampler is None else None
        followers = [*(block.first for block in level.residuals[1:]), after_last]
        for block, follower in zip(level.residuals, followers, strict=True):
            x_FHWC, raw = self._residual(block, x_FHWC, raw, follower, carried)
        if level.upsampler is None:
            return x_FHWC, raw
        if level.doubler is not None and not carried.first:
            x_FHWC = self._ops.double_time(level.doubler, x_FHWC, carried)
        raw = self._ops.upsample(level.upsampler, x_FHWC, carried)
        time_factor = 1 if level.doubler is None else 2
        skipped_frames = time_factor - 1 if carried.first else 0
        return self._feed(raw, Shortcut(begun_FHWC, time_factor, 2, skipped_frames), following, carried)


class _Builder:
    """Reads diffusers' modules in the order of the network."""

    def __init__(self, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
        self._ops = ops
        self._device = device
        self._dtype = dtype
        self._num_over_time = 0
        self._role = Role.SINGLE

    def causal(self, conv: nn.Conv3d, norm: Any, role: Role | None = None) -> Causal:
        gamma_C = None if norm is None else self._place(norm.gamma.flatten())
        role = role or self._role
        weights = self._ops.causal_weights(conv.weight.to(self._device), role)
        return Causal(self._index(), self._rounded(weights), self._place(conv.bias), gamma_C, role)

    def residual(self, block: Any) -> Residual:
        first = self.causal(block.conv1, block.norm1)
        second = self.causal(block.conv2, block.norm2)
        has_own = not isinstance(block.conv_shortcut, nn.Identity)
        return Residual(first, second, self.linear(block.conv_shortcut) if has_own else None)

    def attention(self, block: Any) -> Attention:
        return Attention(self._place(block.norm.gamma.flatten()), self.linear(block.to_qkv), self.linear(block.proj))

    def level(self, block: Any) -> Level:
        residuals = tuple(self.residual(resnet) for resnet in block.resnets)
        if block.upsampler is None:
            return Level(residuals, None, None)
        doubler = None
        if block.upsampler.mode == "upsample3d":
            conv = block.upsampler.time_conv
            doubler = TimeDoubler(self._index(), self._rounded((conv.weight,))[0], self._place(conv.bias))
            self._role = Role.SEVERAL
        conv = block.upsampler.resample[1]
        weights = self._rounded(self._ops.upsample_weights(conv.weight.to(self._device)))
        return Level(residuals, doubler, Upsampler(weights, self._place(conv.bias)))

    def linear(self, conv: nn.Conv2d | nn.Conv3d) -> Linear:
        return Linear(self._place(conv.weight.flatten(1)), self._place(conv.bias))

    def _index(self) -> int:
        self._num_over_time += 1
        return self._num_over_time

    def _place(self, value: torch.Tensor | None) -> torch.Tensor:
        assert value is not None
        return value.detach().to(self._device, self._dtype)

    def _rounded(self, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """In the dtype of the arithmetic and, for cuDNN's fast kernels, with channels innermost."""
        placed = tuple(self._place(weight) for weight in weights)
        if self._device.type != "cuda":
            return placed
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tuple(w.contiguous(memory_format=formats.get(w.dim(), torch.contiguous_format)) for w in placed)
