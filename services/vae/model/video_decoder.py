"""The Wan2.2 video decoder as a stream: latent frames in, pictures out, the past carried in between.

Source: Wan (arXiv 2503.20314) section 4. Shapes as in `video_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
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
    Window,
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


@dataclass(frozen=True)
class _Weights:
    """All of it, in order."""

    post_quant: Linear
    conv_in: Causal
    mid_first: Residual
    mid_second: Residual
    attention: Attention
    levels: tuple[Level, ...]
    conv_out: Causal


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
        self._weights = _Weights(
            post_quant=builder.linear(network.post_quant_conv),
            conv_in=builder.causal(decoder.conv_in, None),
            mid_first=builder.residual(decoder.mid_block.resnets[0]),
            mid_second=builder.residual(decoder.mid_block.resnets[1]),
            attention=builder.attention(decoder.mid_block.attentions[0]),
            levels=tuple(builder.level(block) for block in decoder.up_blocks),
            conv_out=builder.causal(decoder.conv_out, decoder.norm_out, Role.LAST),
        )
        self._levels = self._weights.levels

    @property
    def ops(self) -> Ops:
        """Implementations of the operations."""
        return self._ops

    @property
    def reach(self) -> int:
        """Latent pixels beyond a window that its pictures depend on, after the attention and the first level."""
        reach = 1  # of the last convolution, in pixels of the last level
        for level in reversed(self._levels[1:]):
            reach += 2 * len(level.residuals) + 1  # and of the upsampler before the level
            reach = -(-reach // 2)
        return reach

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights by name."""
        return dict(_named_tensors(self._weights))

    def stream(
        self,
        latent_FHWC: torch.Tensor,
        dtype: torch.dtype,
        stripe: Stripe | None = None,
        *,
        window: Window | None = None,
        latent_frames_per_step: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Pictures (f, 16H, 16W, 3), step by step: one of the first latent frame, four of every further one.

        A step takes `Ops.latent_frames_per_step` latent frames, whatever the caller does with the pictures.

        Args:
            latent_FHWC: as the network was trained to see it, on the device, in the dtype of its arithmetic.
            dtype: of the pictures: torch.uint8 for levels 0 to 255, else values in [-1, 1].
            stripe: which rows these are, if not the whole picture; the pictures then hold its rows.
            window: part of the picture to make; the pictures are right but for `reach` latent pixels along those of
                its edges that are not the picture's.
            latent_frames_per_step: if not that of the operations; fewer take less memory.
        """
        carried = Carried(stripe, window)
        latent_FHWC = self._weights.post_quant(latent_FHWC)
        yield self._step(latent_FHWC[:1], dtype, carried)
        carried.first = False
        for part_FHWC in latent_FHWC[1:].split(latent_frames_per_step or self._ops.latent_frames_per_step):
            if len(part_FHWC):
                yield self._step(part_FHWC, dtype, carried)

    def _step(self, latent_FHWC: torch.Tensor, dtype: torch.dtype, carried: Carried) -> torch.Tensor:
        weights, flow = self._weights, _Flow(raw=Raw((latent_FHWC,)))
        self._feed(flow, weights.conv_in, carried, keep=False)
        self._feed(flow, weights.mid_first.first, carried)
        self._residual(weights.mid_first, flow, None, carried)
        self._attend(flow, weights.mid_second.first, carried)
        self._residual(weights.mid_second, flow, self._levels[0].residuals[0].first, carried)
        followers = [*(level.residuals[0].first for level in self._levels[1:]), weights.conv_out]
        for level, following in zip(self._levels, followers, strict=True):
            self._level(level, flow, following, carried)
        return self._ops.pixels(weights.conv_out, flow.take_raw(), dtype, carried)

    def _feed(self, flow: _Flow, following: Causal | None, carried: Carried, *, keep: bool = True) -> None:
        """Finish the flow's result; its frames (None unless `keep`), and what the convolution after makes of them."""
        raw, shortcut = flow.take_raw(), flow.take_shortcut()
        flow.x_FHWC, fed = self._ops.join(raw, shortcut, following, carried, keep=keep)
        del raw, shortcut
        if following is not None:
            flow.raw = self._ops.convolve(following, fed, carried)

    def _residual(self, block: Residual, flow: _Flow, following: Causal | None, carried: Carried) -> None:
        """The flow's result is what the block's first convolution has made of its frames."""
        x_FHWC = flow.take_x()
        shortcut = Shortcut(x_FHWC if block.shortcut is None else block.shortcut(x_FHWC))
        del x_FHWC
        self._feed(flow, block.second, carried, keep=False)
        flow.shortcut = shortcut
        del shortcut
        keep = following is None or following.role is not Role.LAST
        self._feed(flow, following, carried, keep=keep)

    def _attend(self, flow: _Flow, following: Causal, carried: Carried) -> None:
        attention, x_FHWC = self._weights.attention, flow.take_x()
        channels = x_FHWC.shape[-1]
        q_FHWC, kv_FHWC = attention.qkv(rms_norm(x_FHWC, attention.gamma_C)).split([channels, 2 * channels], dim=-1)
        if carried.stripe is not None:
            kv_FHWC = carried.stripe.gather_rows(kv_FHWC.contiguous())
        k_FSC, v_FSC = kv_FHWC.flatten(1, 2).chunk(2, dim=-1)
        mixed_FSC = self._ops.attend(q_FHWC.flatten(1, 2), k_FSC, v_FSC)
        flow.raw, flow.shortcut = Raw((attention.proj(mixed_FSC).view(x_FHWC.shape),)), Shortcut(x_FHWC)
        self._feed(flow, following, carried)

    def _level(self, level: Level, flow: _Flow, following: Causal, carried: Carried) -> None:
        begun_FHWC: Any = None if level.upsampler is None else flow.x_FHWC
        after_last = following if level.upsampler is None else None
        followers = [*(block.first for block in level.residuals[1:]), after_last]
        for block, follower in zip(level.residuals, followers, strict=True):
            self._residual(block, flow, follower, carried)
        if level.upsampler is None:
            return
        x_FHWC = flow.take_x()
        if level.doubler is not None and not carried.first:
            x_FHWC = self._ops.double_time(level.doubler, x_FHWC, carried)
        if carried.window is not None and level is self._levels[0]:
            x_FHWC, begun_FHWC = carried.window.cut(x_FHWC), carried.window.cut(begun_FHWC)
        flow.raw = self._ops.upsample(level.upsampler, x_FHWC, carried)
        time_factor = 1 if level.doubler is None else 2
        skipped_frames = time_factor - 1 if carried.first else 0
        flow.shortcut = Shortcut(begun_FHWC, time_factor, 2, skipped_frames)
        del x_FHWC, begun_FHWC
        self._feed(flow, following, carried)


@dataclass
class _Flow:
    """What one operation leaves to the next, which takes it out: nothing is kept longer than it is needed."""

    x_FHWC: Any = None
    """Finished frames."""
    raw: Any = None
    shortcut: Any = None
    """Still to be added to `raw`."""

    def take_x(self) -> torch.Tensor:
        """The frames, which are then the caller's alone."""
        x_FHWC, self.x_FHWC = self.x_FHWC, None
        return x_FHWC

    def take_raw(self) -> Raw:
        """The same of the result."""
        raw, self.raw = self.raw, None
        return raw

    def take_shortcut(self) -> Shortcut | None:
        """The same of the shortcut."""
        shortcut, self.shortcut = self.shortcut, None
        return shortcut


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors inside of dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _named_tensors(part, f"{name}.{index}")
    elif is_dataclass(value):
        for part in fields(value):
            yield from _named_tensors(getattr(value, part.name), f"{name}.{part.name}")


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
