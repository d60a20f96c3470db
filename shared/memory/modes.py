"""The memory modes by name, and what each of them means for the stages."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class VramMode(enum.Enum):
    """How device memory is used; values are the names that Ovi's users know."""

    AUTO = "auto"
    STANDARD = "standard"
    FP8 = "fp8"
    FP8_OFFLOAD = "fp8_offload"
    ULTRA_LOW = "ultra_low"
    STREAMED = "streamed"
    ALL_GPU = "all_gpu"


class WeightFormat(enum.Enum):
    """How the wide layers of the fusion model are held; NATIVE is the only lossless one."""

    NATIVE = "native"
    FP8 = "fp8"
    INT8 = "int8"


class TextEncoderPlace(enum.Enum):
    """Where the text encoder's layers are."""

    RESIDENT = "resident"
    """On the device, always."""
    STREAMED = "streamed"
    """In host memory; each comes to the device as it is needed. The same values."""
    CPU = "cpu"
    """It runs on the CPU, so that its process has no context on the device."""


@dataclass(frozen=True)
class Recipe:
    """What a mode means."""

    weights: WeightFormat
    takes_turns: bool
    """One stage at a time has the device; what it holds is in host memory too, and is given up after its turn."""
    text_encoder: TextEncoderPlace

    @property
    def lossless(self) -> bool:
        """True if results are those of the released weights."""
        return self.weights is WeightFormat.NATIVE


RECIPES: dict[VramMode, Recipe] = {
    VramMode.ALL_GPU: Recipe(WeightFormat.NATIVE, takes_turns=False, text_encoder=TextEncoderPlace.RESIDENT),
    VramMode.STANDARD: Recipe(WeightFormat.NATIVE, takes_turns=False, text_encoder=TextEncoderPlace.RESIDENT),
    VramMode.STREAMED: Recipe(WeightFormat.NATIVE, takes_turns=True, text_encoder=TextEncoderPlace.STREAMED),
    VramMode.FP8: Recipe(WeightFormat.FP8, takes_turns=True, text_encoder=TextEncoderPlace.STREAMED),
    VramMode.FP8_OFFLOAD: Recipe(WeightFormat.FP8, takes_turns=True, text_encoder=TextEncoderPlace.STREAMED),
    VramMode.ULTRA_LOW: Recipe(WeightFormat.INT8, takes_turns=True, text_encoder=TextEncoderPlace.CPU),
}
"""Every mode but AUTO, which is one of them."""
LOWER: dict[VramMode, tuple[VramMode, ...]] = {
    VramMode.ALL_GPU: (VramMode.STANDARD, VramMode.STREAMED, VramMode.FP8_OFFLOAD, VramMode.ULTRA_LOW),
    VramMode.STANDARD: (VramMode.STREAMED, VramMode.FP8_OFFLOAD, VramMode.ULTRA_LOW),
    VramMode.STREAMED: (VramMode.FP8_OFFLOAD, VramMode.ULTRA_LOW),
    VramMode.FP8: (VramMode.FP8_OFFLOAD, VramMode.ULTRA_LOW),
    VramMode.FP8_OFFLOAD: (VramMode.ULTRA_LOW,),
    VramMode.ULTRA_LOW: (),
}
"""What takes less memory than a mode, in the order in which it is tried."""


def may_become(wanted: VramMode, mode: VramMode) -> bool:
    """Whether a job that asked for `wanted` may be made in `mode`: a loss has to be asked for, by AUTO or by name."""
    return wanted is VramMode.AUTO or RECIPES[mode].lossless or not RECIPES[wanted].lossless
