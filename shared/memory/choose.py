"""Which mode fits which device, and how a stage's work is laid out in it. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from shared.errors import OutOfMemory
from shared.memory.estimate import (
    Components,
    FusionLayout,
    VaeLayout,
    estimate_fusion,
    estimate_text_encoder,
    estimate_vae,
)
from shared.memory.modes import LOWER, RECIPES, TextEncoderPlace, VramMode, WeightFormat
from shared.memory.sizes import ClipTokens, FusionSizes, TextEncoderSizes, VaeSizes

GIB = 2**30
TOKEN_CHUNKS = (None, 8192, 4096, 2048)
"""Video tokens at once, tried in this order; fewer take less memory and leave the GPU's units idle more often."""
LATENT_FRAMES_PER_STEP = (2, 1)
TILE_LATENT_SIDES = (32, 24, 16, 12, 8)
"""512 to 128 pixels; tried last, since what is around a tile is decoded with it."""
_ALL_GPU_BYTES = 78 * 10**9
"""Cards sold as 80 GB tell a little less."""
_PARTLY_RESIDENT = (VramMode.STREAMED, VramMode.FP8_OFFLOAD, VramMode.ULTRA_LOW)

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU, as far as a choice depends on it."""

    name: str
    """As PyTorch calls it, for example "cuda:0"."""
    total_bytes: int
    free_bytes: int
    """Memory that nobody has."""
    capability: str
    """Compute capability, for example "9.0"; empty if there is none."""
    unified: bool
    """Its memory is the host's."""

    @property
    def index(self) -> int:
        """Its number among the GPUs of this host; 0 if its name has none."""
        return int(self.name.partition(":")[2] or 0)


@dataclass(frozen=True)
class FusionPlan:
    """How the fusion model's process uses a device."""

    mode: VramMode
    layout: FusionLayout
    components: Components
    budget_bytes: int | None
    """What its allocator may reserve; None: no limit."""


@dataclass(frozen=True)
class VaePlan:
    """How the VAE's process uses a device."""

    mode: VramMode
    layout: VaeLayout
    components: Components
    budget_bytes: int | None


@dataclass(frozen=True)
class TextEncoderPlan:
    """How the text encoder's process uses a device."""

    mode: VramMode
    place: TextEncoderPlace
    components: Components
    budget_bytes: int | None


@dataclass(frozen=True)
class Subject:
    """What a plan is for, in the words of a refusal."""

    clip: str = "the clip"
    device: str = "the device"


def gib(num_bytes: int) -> str:
    """ "29.9 GiB"."""
    return f"{num_bytes / GIB:.1f} GiB"


def candidates(device: DeviceFacts | None) -> tuple[VramMode, ...]:
    """What AUTO tries: the fastest lossless mode first, lossy ones last. FP8 is for those who name it."""
    large = device is not None and (device.unified or device.total_bytes >= _ALL_GPU_BYTES)
    return (VramMode.ALL_GPU if large else VramMode.STANDARD, *LOWER[VramMode.STANDARD])


def choose_mode(device: DeviceFacts | None, plan: Callable[[VramMode], Plan]) -> Plan:
    """The plan of the first of `candidates` that fits.

    Args:
        device: where; None: nothing is known about it.
        plan: of a mode; raises OutOfMemory if it does not fit.

    Raises:
        OutOfMemory: none fits; that of the mode that takes least.
    """
    *others, last = candidates(device)
    for mode in others:
        try:
            return plan(mode)
        except OutOfMemory:
            continue
    return plan(last)


def plan_fusion(
    sizes: FusionSizes,
    clip: ClipTokens,
    mode: VramMode,
    budget_bytes: int | None,
    *,
    sequence_degree: int = 1,
    guidance_degree: int = 1,
    weights_degree: int = 1,
    subject: Subject = Subject(),
) -> FusionPlan:
    """The layout with most blocks on the device that fits, and fewer tokens at once if that does not do.

    Args:
        sizes: of the model.
        clip: what is made.
        mode: not AUTO, see `choose_mode`.
        budget_bytes: what the process's allocator may reserve; None: no limit, and all is streamed
            that the mode can stream.
        sequence_degree: see estimate_fusion, as for the next two.
        guidance_degree: see there.
        weights_degree: see there.
        subject: for the refusal.

    Raises:
        OutOfMemory: nothing fits; with the numbers and the mode that would.
    """

    degrees = (sequence_degree, guidance_degree, weights_degree)
    hosted = RECIPES[mode].takes_turns
    if budget_bytes is None:
        layout = _unlimited(mode, sizes.num_layers)
        return FusionPlan(mode, layout, estimate_fusion(sizes, clip, layout, *degrees, hosted=hosted), None)
    for layout in _fusion_layouts(mode, sizes.num_layers):
        components = estimate_fusion(sizes, clip, layout, *degrees, hosted=hosted)
        if components.reserved <= budget_bytes:
            return FusionPlan(mode, layout, components, budget_bytes)

    def least(of_mode: VramMode) -> int:
        return least_fusion(sizes, clip, of_mode, *degrees).reserved

    raise refusal(mode, least, budget_bytes, subject)


def least_fusion(
    sizes: FusionSizes,
    clip: ClipTokens,
    mode: VramMode,
    sequence_degree: int = 1,
    guidance_degree: int = 1,
    weights_degree: int = 1,
) -> Components:
    """What a mode takes at least; see `plan_fusion`. Modes that cannot share weights are taken not to."""
    *_, layout = _fusion_layouts(mode, sizes.num_layers)
    hosted = RECIPES[mode].takes_turns
    shared = weights_degree if not hosted else 1
    return estimate_fusion(sizes, clip, layout, sequence_degree, guidance_degree, shared, hosted=hosted)


def _fusion_layouts(mode: VramMode, num_layers: int) -> Iterator[FusionLayout]:
    """From the fastest to the one that takes least."""
    weights = RECIPES[mode].weights
    in_fp8 = weights is WeightFormat.FP8
    fewest = (2 if in_fp8 else 0) if mode in _PARTLY_RESIDENT else num_layers
    for chunk in TOKEN_CHUNKS:
        for resident in range(num_layers, min(fewest, num_layers) - 1, -1):
            yield FusionLayout(weights, resident, chunk, keep_ends=in_fp8 and num_layers >= 2)
        if in_fp8 and fewest < num_layers:
            yield FusionLayout(weights, 0, chunk, keep_ends=False)


def _unlimited(mode: VramMode, num_layers: int) -> FusionLayout:
    """Where nothing limits the memory, a mode that can stream does so: somebody named it."""
    layouts = [layout for layout in _fusion_layouts(mode, num_layers) if layout.token_chunk is None]
    return layouts[-1]


def plan_vae(
    sizes: VaeSizes,
    height: int,
    width: int,
    mode: VramMode,
    budget_bytes: int | None,
    *,
    ranks: int = 1,
    tiles: bool = True,
    subject: Subject = Subject(),
) -> VaePlan:
    """Most latent frames at once that fit; tiles where not even one does.

    Args:
        sizes: of the networks.
        height: of a picture in pixels.
        width: of a picture.
        mode: not AUTO.
        budget_bytes: what the process's allocator may reserve; None: no limit.
        ranks: that share a picture.
        tiles: whether pictures may be decoded in tiles.
        subject: for the refusal.

    Raises:
        OutOfMemory: nothing fits; with the numbers.
    """
    for layout in vae_layouts(tiles=tiles):
        components = estimate_vae(sizes, height, width, layout, ranks, hosted=RECIPES[mode].takes_turns)
        if budget_bytes is None or components.reserved <= budget_bytes:
            return VaePlan(mode, layout, components, budget_bytes)
    assert budget_bytes is not None
    need = f"the decoder needs {gib(components.reserved)} on {subject.device} for {subject.clip}"
    raise OutOfMemory(f"{need}, {gib(budget_bytes)} may be used; use a smaller size, or more GPUs")


def least_vae(sizes: VaeSizes, height: int, width: int, mode: VramMode, *, ranks: int, tiles: bool) -> Components:
    """What decoding takes at least; see `plan_vae`."""
    hosted = RECIPES[mode].takes_turns
    return estimate_vae(sizes, height, width, vae_layouts(tiles=tiles)[-1], ranks, hosted=hosted)


def vae_layouts(*, tiles: bool) -> list[VaeLayout]:
    """From the fastest to the one that takes least."""
    whole = [VaeLayout(frames, None) for frames in LATENT_FRAMES_PER_STEP]
    return whole + [VaeLayout(LATENT_FRAMES_PER_STEP[-1], side) for side in TILE_LATENT_SIDES if tiles]


def plan_text_encoder(
    sizes: TextEncoderSizes,
    mode: VramMode,
    budget_bytes: int | None,
    *,
    subject: Subject = Subject(),
) -> TextEncoderPlan:
    """Where the mode puts the text encoder.

    Raises:
        OutOfMemory: it does not fit there; with the numbers and the mode that would.
    """

    def need(of_mode: VramMode) -> Components:
        return estimate_text_encoder(sizes, RECIPES[of_mode].text_encoder)

    components = need(mode)
    if budget_bytes is not None and components.reserved > budget_bytes:
        raise refusal(mode, lambda other: need(other).reserved, budget_bytes, subject)
    return TextEncoderPlan(mode, RECIPES[mode].text_encoder, components, budget_bytes)


def refusal(mode: VramMode, least: Callable[[VramMode], int], budget_bytes: int, subject: Subject) -> OutOfMemory:
    """What is lacking, and the first lower mode that would fit.

    Args:
        mode: which does not fit.
        least: bytes that a mode needs at least.
        budget_bytes: what there is.
        subject: what it is for.
    """
    what = f"{mode.value} needs {gib(least(mode))} on {subject.device} for {subject.clip}"
    fitting = next((other for other in LOWER[mode] if least(other) <= budget_bytes), None)
    advice = "no mode fits" if fitting is None else f"{fitting.value} fits ({gib(least(fitting))})"
    return OutOfMemory(f"{what}, {gib(budget_bytes)} may be used; {advice}")
