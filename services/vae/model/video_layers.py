"""What the video decoder is made of: weights, shortcuts, carried state, and its operations in plain PyTorch.

F frames, H rows and W columns of this process's stripe of the picture, C channels, N pictures. Activations are FHWC:
channels innermost in memory, as the fast convolutions want them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional as F

MIN_NORM = 1e-12
"""Least length that a pixel's channels are divided by, as in torch.nn.functional.normalize."""
TAPS = 3
"""Frames, rows and columns that a convolution sees."""
PIXEL_CHANNELS = 3


class Role(enum.Enum):
    """What the driver knows about a causal convolution's place in the network."""

    SINGLE = "single"
    """Before the first doubling of time: any number of frames a step."""
    SEVERAL = "several"
    """After it: one frame in the first step, an even number in every further one."""
    LAST = "last"
    """Makes the pixels."""


@dataclass(frozen=True)
class Causal:
    """A 3x3x3 convolution that sees two frames back, and the norm and SiLU before it."""

    index: int
    """Its place in `Carried.states`."""
    weights: tuple[torch.Tensor, ...]
    """As `Ops.causal_weights` laid them out."""
    bias_C: torch.Tensor
    gamma_C: torch.Tensor | None
    """Gain of the RMS norm over channels; None: its input goes in as it is."""
    role: Role


@dataclass(frozen=True)
class Upsampler:
    """Doubling of both sides of a picture: nearest neighbours, then a 3x3 convolution."""

    weights: tuple[torch.Tensor, ...]
    """As `Ops.upsample_weights` laid them out."""
    bias_C: torch.Tensor


@dataclass(frozen=True)
class TimeDoubler:
    """A convolution over three frames that makes two of each, the first half of its channels being the earlier."""

    index: int
    """Its place in `Carried.states`."""
    weight: torch.Tensor
    bias_C: torch.Tensor


@dataclass(frozen=True)
class Shortcut:
    """What is added to a convolution's result: `x_FHWC`, its values repeated over frames and pixels if factors say so.

    Output channel c at (frame a, row b, column d) inside the repeated cell is input channel
    ((c * time_factor + a) * 4 + 2 b + d) // repeats, as channels are few and cells many.
    """

    x_FHWC: torch.Tensor
    time_factor: int = 1
    space_factor: int = 1
    skipped_frames: int = 0
    """Frames left out at the beginning: all but the last copy of a clip's first frame."""

    def repeats(self, channels: int) -> int:
        """Output elements made of each input element."""
        return channels * self.time_factor * self.space_factor**2 // self.x_FHWC.shape[-1]

    def expand(self, channels: int) -> torch.Tensor:
        """The whole tensor that is added."""
        if self.time_factor == self.space_factor == 1:
            return self.x_FHWC
        frames, height, width, _ = self.x_FHWC.shape
        cell = (self.time_factor, self.space_factor, self.space_factor)
        x = self.x_FHWC.repeat_interleave(self.repeats(channels), dim=-1)
        x = x.view(frames, height, width, channels, *cell).permute(0, 4, 1, 5, 2, 6, 3)
        return x.reshape(frames * cell[0], height * cell[1], width * cell[2], channels)[self.skipped_frames :]


class Form(enum.Enum):
    """How a convolution leaves its result to the pass that reads it next."""

    WHOLE = 0
    """One part (F, H, W, C)."""
    PAIRS = 1
    """Four parts (F/2, H, W, C): even frames are 0 + 1 + 2, odd frames 1 - 2 - 3."""
    PHASES = 2
    """One part (F, H/2 + 1, W/2 + 1, 4C): row 2i + b, column 2j + d is at (i + b, j + d), channels (2b + d) C on."""
    TAPS = 3
    """One part (27C, F, H, W), halo rows included: every tap's product with every pixel."""


@dataclass(frozen=True)
class Raw:
    """A convolution's result that no pass over memory has finished yet."""

    parts: tuple[torch.Tensor, ...]
    form: Form = Form.WHOLE
    bias_C: torch.Tensor | None = None
    """Still to be added."""


class Stripe(Protocol):
    """One of several stripes of full rows that a picture is cut into; they may differ in height.

    All stripes make the same calls in the same order.
    """

    def fill_halo(self, x_NHWC: torch.Tensor) -> None:
        """Fill the spare first and last row of every picture with the adjoining stripes' rows, at the edge with zeros.

        Rows 1 to -1 are this stripe's own.
        """

    def gather_rows(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """The rows of all stripes, from the top."""


@dataclass(frozen=True)
class Window:
    """A part of the picture, in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, x_FHWC: torch.Tensor) -> torch.Tensor:
        """A copy of it from frames as large as the latent."""
        return x_FHWC[:, self.top : self.top + self.height, self.left : self.left + self.width].contiguous()


@dataclass
class Carried:
    """What one decode carries from step to step."""

    stripe: Stripe | None = None
    """None: the whole picture."""
    window: Window | None = None
    """What of the picture is made; None: all of it. From the second level on, nothing else is there."""
    first: bool = True
    """Whether this is the clip's first latent frame, which makes one picture."""
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """The past frames of every convolution over time, by its index."""

    @property
    def halo(self) -> int:
        """Spare rows at both ends of a convolution's input."""
        return int(self.stripe is not None)

    def padding(self, rows: int = 1) -> int:
        """Rows of zeros that a convolution adds itself."""
        return 0 if self.stripe is not None else rows

    def fill_halo(self, x_NHWC: torch.Tensor) -> None:
        """See `Stripe.fill_halo`; nothing to do for the whole picture."""
        if self.stripe is not None:
            self.stripe.fill_halo(x_NHWC)

    def with_halo(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """A copy with halo rows; the tensor itself for the whole picture."""
        if self.stripe is None:
            return x_NHWC
        padded = F.pad(x_NHWC, (0, 0, 0, 0, 1, 1))
        self.stripe.fill_halo(padded)
        return padded


class Ops(Protocol):
    """The decoder's operations. All implementations compute the same function, up to rounding."""

    name: str
    latent_frames_per_step: int
    """Latent frames, after the first, that go through the network together."""

    def causal_weights(self, weight_OIFHW: torch.Tensor, role: Role) -> tuple[torch.Tensor, ...]:
        """A causal convolution's weights as this implementation wants them; float32, rounded afterwards."""

    def upsample_weights(self, weight_OIHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same of an upsampler's convolution."""

    def join(
        self, raw: Raw, shortcut: Shortcut | None, following: Causal | None, carried: Carried, *, keep: bool
    ) -> tuple[Any, Any]:
        """Sum of result, bias and shortcut (None unless `keep`), and what `convolve(following, ...)` takes of it."""

    def convolve(self, causal: Causal, fed: Any, carried: Carried) -> Raw:
        """The causal convolution of what `join` has prepared."""

    def double_time(self, doubler: TimeDoubler, x_FHWC: torch.Tensor, carried: Carried) -> torch.Tensor:
        """(2F, H, W, C)."""

    def upsample(self, upsampler: Upsampler, x_FHWC: torch.Tensor, carried: Carried) -> Raw:
        """(F, 2H, 2W, C)."""

    def attend(self, q_FSC: torch.Tensor, k_FSC: torch.Tensor, v_FSC: torch.Tensor) -> torch.Tensor:
        """Softmax attention with one head, within each frame."""

    def pixels(self, last: Causal, raw: Raw, dtype: torch.dtype, carried: Carried) -> torch.Tensor:
        """Of the last convolution's result, (F, 2H, 2W, 3): values in [-1, 1], or levels 0 to 255 for torch.uint8."""


def rms_norm(x_FHWC: torch.Tensor, gamma_C: torch.Tensor) -> torch.Tensor:
    """Channels divided by their root mean square, times gamma; statistics in float32."""
    normed = F.normalize(x_FHWC.float(), dim=-1, eps=MIN_NORM).to(x_FHWC.dtype)
    return normed * x_FHWC.shape[-1] ** 0.5 * gamma_C


def channels_first(x_FHWC: torch.Tensor) -> torch.Tensor:
    """The frames as one (1, C, F, H, W), same memory."""
    return x_FHWC.permute(3, 0, 1, 2)[None]


def to_levels(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pixels in [-1, 1] as they are, or as levels 0 to 255 if `dtype` is torch.uint8."""
    if dtype != torch.uint8:
        return pixels.to(dtype)
    return pixels.float().add(1.0).mul(127.5).round().to(torch.uint8)


class ReferenceOps:
    """Plain PyTorch on any device, one latent frame a step: the definition that others are tested against."""

    name = "reference"
    latent_frames_per_step = 1

    def causal_weights(self, weight_OIFHW: torch.Tensor, role: Role) -> tuple[torch.Tensor, ...]:
        return (weight_OIFHW,)

    def upsample_weights(self, weight_OIHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (weight_OIHW,)

    def join(
        self, raw: Raw, shortcut: Shortcut | None, following: Causal | None, carried: Carried, *, keep: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_FHWC = raw.parts[0] if raw.bias_C is None else raw.parts[0] + raw.bias_C
        if shortcut is not None:
            x_FHWC = x_FHWC + shortcut.expand(x_FHWC.shape[-1])
        fed = x_FHWC
        if following is not None and following.gamma_C is not None:
            fed = F.silu(rms_norm(x_FHWC, following.gamma_C))
        return x_FHWC if keep else None, None if following is None else fed

    def convolve(self, causal: Causal, fed: torch.Tensor, carried: Carried) -> Raw:
        x_FHWC = _after_past(carried.with_halo(fed), causal.index, carried)
        padding = (0, carried.padding(), 1)
        y = F.conv3d(channels_first(x_FHWC), causal.weights[0], causal.bias_C, padding=padding)
        return Raw((y[0].permute(1, 2, 3, 0),))

    def double_time(self, doubler: TimeDoubler, x_FHWC: torch.Tensor, carried: Carried) -> torch.Tensor:
        past = _after_past(x_FHWC, doubler.index, carried)
        y = F.conv3d(channels_first(past), doubler.weight, doubler.bias_C)[0].permute(1, 2, 3, 0)
        return y.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)

    def upsample(self, upsampler: Upsampler, x_FHWC: torch.Tensor, carried: Carried) -> Raw:
        x_NCHW = F.interpolate(carried.with_halo(x_FHWC).permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
        x_NCHW = x_NCHW[:, :, carried.halo : x_NCHW.shape[2] - carried.halo]
        y = F.conv2d(x_NCHW, upsampler.weights[0], upsampler.bias_C, padding=(carried.padding(), 1))
        return Raw((y.permute(0, 2, 3, 1),))

    def attend(self, q_FSC: torch.Tensor, k_FSC: torch.Tensor, v_FSC: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q_FSC[:, None], k_FSC[:, None], v_FSC[:, None])[:, 0]

    def pixels(self, last: Causal, raw: Raw, dtype: torch.dtype, carried: Carried) -> torch.Tensor:
        patches_FHWC = raw.parts[0].clamp(-1.0, 1.0)
        side = round((patches_FHWC.shape[-1] / PIXEL_CHANNELS) ** 0.5)
        # Channels of a patch: colour, column, row.
        patches = patches_FHWC.unflatten(-1, (PIXEL_CHANNELS, side, side)).permute(0, 1, 5, 2, 4, 3)
        return to_levels(patches.flatten(3, 4).flatten(1, 2), dtype)


def _after_past(x_FHWC: torch.Tensor, index: int, carried: Carried) -> torch.Tensor:
    """The two frames before, zeros at first, then `x_FHWC`; the last two are kept for the next step."""
    past = carried.states.get(index)
    if past is None:
        past = x_FHWC.new_zeros(TAPS - 1, *x_FHWC.shape[1:])
    x_FHWC = torch.cat([past, x_FHWC])
    carried.states[index] = x_FHWC[1 - TAPS :].clone()
    return x_FHWC
