"""What variants take of this process's device, and which memory mode suits them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from services.fusion.checkpoint import FusionFile
from services.fusion.model.config import FusionConfig
from services.fusion.parallel.groups import Groups
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.request import ServedVariant
from shared.device_memory import device_facts, free_to_take, limit_memory
from shared.errors import CheckpointError, InvalidRequest, OutOfMemory
from shared.logging import get_logger
from shared.memory.choose import FusionPlan, Subject, choose_mode, gib, least_fusion, plan_fusion
from shared.memory.modes import LOWER, RECIPES, VramMode, may_become
from shared.memory.sizes import ClipTokens, FusionSizes
from shared.shapes import common_sizes
from shared.variants import VARIANTS

log = get_logger(__name__)


class MemoryPlanner:
    """Plans for one device and one way of sharing it. Plans of a variant hold for all its sizes."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, groups: Groups | None, memory_bytes: int | None
    ) -> None:
        """
        Args:
            device: where the model runs.
            dtype: arithmetic of the model.
            groups: ranks that share every run; None if this process is alone.
            memory_bytes: most that this process may reserve, enforced from now on; None: what is free now.
        """
        self._device = device
        self._itemsize = dtype.itemsize
        self._facts = device_facts(device)
        self._degrees = {"sequence_degree": 1, "guidance_degree": 1, "weights_degree": 1}
        self.allocation = "single"
        """How runs are spread over devices."""
        if groups is not None:
            weights = groups.weights.size(-1) if groups.weights is not None else 1
            self._degrees = {
                "sequence_degree": groups.sequence.size,
                "guidance_degree": groups.guidance.size,
                "weights_degree": weights,
            }
            self.allocation = ", ".join(f"{name.removesuffix('_degree')} {n}" for name, n in self._degrees.items())
        self._alone = groups is None
        self.budget_bytes = free_to_take(device) if memory_bytes is None else memory_bytes
        """What this process's allocator may reserve; None: nothing limits it."""
        if memory_bytes is not None:
            limit_memory(device, memory_bytes)

    def plan(self, served: ServedVariant, mode: VramMode) -> FusionPlan:
        """The layout of a variant in a mode that has a name.

        Raises:
            OutOfMemory: it does not fit; with the numbers and the mode that would.
            InvalidRequest: the mode is not for this device, or not for several.
        """
        if mode is VramMode.ALL_GPU and self._device.type == "cpu":
            raise InvalidRequest.of("vram_mode", "got all_gpu, and the service runs on a CPU; allowed is standard")
        if RECIPES[mode].takes_turns and not self._alone:
            what = f"got {mode.value}, which is for one GPU; on several, allowed is standard or all_gpu"
            raise InvalidRequest.of("vram_mode", what)
        return self._plan(served, mode, self.budget_bytes)

    def _plan(self, served: ServedVariant, mode: VramMode, budget_bytes: int | None) -> FusionPlan:
        subject = Subject(served.variant.id, str(self._device))
        sizes = fusion_sizes(served.file.config, self._itemsize)
        return plan_fusion(sizes, largest_clip(served), mode, budget_bytes, subject=subject, **self._degrees)

    def settle(self, mode: VramMode, served: Sequence[ServedVariant]) -> VramMode:
        """A mode that has a name and fits the largest of these variants that fits at all.

        Args:
            mode: AUTO: the best that does.
            served: at least one.

        Raises:
            OutOfMemory: not even the smallest fits; see `plan`.
            InvalidRequest: see `plan`.
        """
        *larger, smallest = sorted(served, key=lambda each: largest_clip(each).video, reverse=True)
        for each in larger:
            try:
                return self._settle(mode, each)
            except OutOfMemory as error:
                log.warning("variant does not fit", model=each.variant.id, reason=error.message)
        return self._settle(mode, smallest)

    def _settle(self, mode: VramMode, served: ServedVariant) -> VramMode:
        if mode is not VramMode.AUTO:
            return self.plan(served, mode).mode
        if self._device.type == "cpu" or not self._alone:
            return self.plan(served, VramMode.STANDARD).mode
        return choose_mode(self._facts, lambda each: self.plan(served, each)).mode

    def lower(self, served: ServedVariant, wanted: VramMode, mode: VramMode, reason: str) -> VramMode:
        """The mode for a run whose memory ran out.

        Args:
            served: its variant.
            wanted: what it asked for; a loss has to be asked for.
            mode: in which memory ran out.
            reason: how it ran out, in the allocator's words.

        Raises:
            OutOfMemory: there is none.
        """
        for lower in LOWER[mode]:
            if not may_become(wanted, lower):
                continue
            try:
                return self.plan(served, lower).mode
            except OutOfMemory:
                continue
        need = gib(self._plan(served, mode, None).components.reserved)
        limit = "" if self.budget_bytes is None else f", {gib(self.budget_bytes)} may be used"
        raise OutOfMemory(
            f"memory of {self._device} ran out in mode {mode.value} for {served.variant.id} (estimated: {need}{limit}),"
            f" and no lower mode may be used: {reason}; free the device, or ask for a lower mode"
        )

    def least(self, served: ServedVariant, mode: VramMode) -> FusionPlan:
        """A variant in a mode as if nothing limited the memory; a mode that can stream all blocks does so."""
        return replace(self._plan(served, mode, None), budget_bytes=self.budget_bytes)


def standard_bytes(folder: Path, dtype: torch.dtype, plan: ParallelPlan) -> int:
    """Most that a rank of a plan reserves in standard mode, over the variants of a folder that can be read.

    Args:
        folder: in the released layout.
        dtype: arithmetic of the model.
        plan: of the ranks.
    """
    most = 0
    for variant in VARIANTS.values():
        # What is wrong with a file is said where it is opened to be served.
        with contextlib.suppress(CheckpointError):
            served = ServedVariant(variant, FusionFile.open(folder / variant.file), "")
            sizes = fusion_sizes(served.file.config, dtype.itemsize)
            degrees = (plan.sequence_degree, plan.guidance_degree, plan.weights_degree)
            most = max(most, least_fusion(sizes, largest_clip(served), VramMode.STANDARD, *degrees).reserved)
    return most


def explain(plan: FusionPlan, served: ServedVariant) -> str:
    """A plan in one line."""
    layout, num_layers = plan.layout, served.file.config.num_layers
    where = "all blocks on the device"
    if RECIPES[plan.mode].takes_turns:
        where = (
            f"{layout.num_resident} of {num_layers} blocks stay on the device during a turn, the others are streamed"
        )
    chunk = "" if layout.token_chunk is None else f", {layout.token_chunk} tokens at once"
    limit = "no limit" if plan.budget_bytes is None else f"of {gib(plan.budget_bytes)}"
    need = gib(plan.components.reserved)
    return f"{plan.mode.value}: {layout.weights.value} weights, {where}{chunk}; {need} {limit} for {served.variant.id}"


def fusion_sizes(config: FusionConfig, itemsize: int) -> FusionSizes:
    """Sizes of a model of these widths."""
    return FusionSizes.of_widths(
        dim=config.dim,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        text_dim=config.text_dim,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        text_len=config.text_len,
        video_channels=config.video_channels,
        audio_channels=config.audio_channels,
        itemsize=itemsize,
    )


def largest_clip(served: ServedVariant) -> ClipTokens:
    """Of all common sizes, the one with most tokens."""
    num_frames, audio_length = served.variant.num_frames, served.audio_shape.length
    clips = [
        ClipTokens.of_clip(num_frames, height, width, audio_length=audio_length)
        for height, width in common_sizes(served.video_area)
    ]
    return max(clips, key=lambda clip: clip.video)
