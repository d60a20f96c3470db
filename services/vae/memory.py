"""What a decode takes of this process's device, and which memory mode suits it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from services.vae.config import VaeOptions
from shared.device_memory import device_facts, free_to_take, limit_memory
from shared.errors import InvalidRequest, OutOfMemory
from shared.memory.choose import Subject, VaePlan, choose_mode, gib, least_vae, plan_vae, vae_layouts
from shared.memory.estimate import VaeLayout, estimate_vae
from shared.memory.modes import RECIPES, VramMode
from shared.memory.sizes import RELEASED_VAE, VaeSizes
from shared.shapes import VideoLatentShape, common_sizes
from shared.variants import VARIANTS, VIDEO_VAE_FILE

_ABOUT = 0.1
"""Weight files that differ less from the released one in size are of its widths."""


@dataclass(frozen=True)
class VaeMemory:
    """Plans for one device."""

    device: torch.device
    sizes: VaeSizes
    budget_bytes: int | None
    """What this process's allocator may reserve; None: nothing limits it."""
    num_ranks: int = 1
    """Processes that share a picture."""

    @classmethod
    def of(cls, options: VaeOptions) -> VaeMemory:
        """By the flags of the service; a limit that they set is enforced from now on."""
        stage = options.stage
        if stage.memory_bytes is not None:
            limit_memory(stage.device, stage.memory_bytes)
        budget = free_to_take(stage.device) if stage.memory_bytes is None else stage.memory_bytes
        path = stage.checkpoints / VIDEO_VAE_FILE
        # What is not there counts as released; loading says that it is not there.
        part = path.stat().st_size / RELEASED_VAE.file_bytes if path.is_file() else 1.0
        sizes = RELEASED_VAE if abs(part - 1) < _ABOUT else RELEASED_VAE.scaled(part)
        wider = stage.precision.itemsize // sizes.itemsize
        sizes = replace(
            sizes,
            decoder_bytes=sizes.decoder_bytes * wider,
            encoder_bytes=sizes.encoder_bytes * wider,
            itemsize=stage.precision.itemsize,
        )
        return cls(stage.device, sizes, budget, options.ranks.world_size)

    def settle(self, mode: VramMode) -> VramMode:
        """A mode that has a name and in which the largest usual picture fits.

        Args:
            mode: AUTO: the best one.

        Raises:
            OutOfMemory: see `plan`, as for the next.
            InvalidRequest: see there.
        """
        size = largest_picture()
        if mode is not VramMode.AUTO:
            return self.plan(mode, *size).mode
        if self.device.type == "cpu" or self.num_ranks > 1:
            return self.plan(VramMode.STANDARD, *size).mode
        return choose_mode(device_facts(self.device), lambda each: self.plan(each, *size)).mode

    def plan(self, mode: VramMode, height: int, width: int) -> VaePlan:
        """How pictures of height x width pixels are decoded in a mode that has a name.

        Raises:
            OutOfMemory: they do not fit; with the numbers.
            InvalidRequest: the mode is not for this device, or not for several.
        """
        if problem := mode_problem(mode, self.device, self.num_ranks):
            raise InvalidRequest.of("vram_mode", problem)
        subject = Subject(f"pictures of {height} x {width}", str(self.device))
        return plan_vae(
            self.sizes,
            height,
            width,
            mode,
            self.budget_bytes,
            ranks=self.num_ranks,
            tiles=self.num_ranks == 1,
            subject=subject,
        )

    def least(self, mode: VramMode, height: int, width: int) -> VaePlan:
        """The plan that takes least in a mode that has a name, whether it fits or not."""
        tiles = self.num_ranks == 1
        components = least_vae(self.sizes, height, width, mode, ranks=self.num_ranks, tiles=tiles)
        return VaePlan(mode, vae_layouts(tiles=tiles)[-1], components, self.budget_bytes)

    def smaller(self, layout: VaeLayout, shape: VideoLatentShape) -> VaeLayout | None:
        """The next layout that takes less for pictures of this shape; None if there is none. They stay the same."""
        if self.num_ranks > 1:
            return None

        def need(each: VaeLayout) -> int:
            return estimate_vae(self.sizes, shape.pixel_height, shape.pixel_width, each).total

        layouts = vae_layouts(tiles=True)
        following = layouts[layouts.index(layout) + 1 :]
        return next((each for each in following if need(each) < need(layout)), None)

    def ran_out(self, mode: VramMode, plan: VaePlan | None, reason: str) -> OutOfMemory:
        """An error with the numbers for memory that ran out all the same.

        Args:
            mode: in which it did.
            plan: that did not do; None: there was none.
            reason: how it ran out, in the allocator's words.
        """
        numbers = [] if plan is None else [f"estimated: {gib(plan.components.reserved)}"]
        numbers += [] if self.budget_bytes is None else [f"{gib(self.budget_bytes)} may be used"]
        what = f"memory of {self.device} ran out in mode {mode.value} ({', '.join(numbers) or 'no limit'})"
        return OutOfMemory(f"{what}: {reason}; free the device, or use a smaller size")


def mode_problem(mode: VramMode, device: torch.device, num_ranks: int) -> str | None:
    """Why a mode is not for this device, or not for so many of them; None if it is."""
    if mode is VramMode.ALL_GPU and device.type == "cpu":
        return (
            "got all_gpu, in which nothing is computed on a CPU, and the device is one; allowed is standard, or a GPU"
        )
    if mode is not VramMode.AUTO and RECIPES[mode].takes_turns and num_ranks > 1:
        what = f"got {mode.value}, which is for one GPU, and {num_ranks} ranks share every picture"
        return f"{what}; allowed is standard or all_gpu, or a single rank"
    return None


def largest_picture() -> tuple[int, int]:
    """(height, width) of the square pictures of the largest released variant."""
    return common_sizes(max(variant.video_area for variant in VARIANTS.values()))[0]


def explain(plan: VaePlan, height: int, width: int) -> str:
    """A plan in one line."""
    where = "weights on the device in turns" if RECIPES[plan.mode].takes_turns else "weights stay on the device"
    layout = plan.layout
    how = f"{layout.latent_frames_per_step} latent frame{'s' * (layout.latent_frames_per_step > 1)} at once"
    if layout.tile_latent_side is not None:
        how += f", tiles of at most {16 * layout.tile_latent_side} pixels"
    limit = "no limit" if plan.budget_bytes is None else f"of {gib(plan.budget_bytes)}"
    need = gib(plan.components.reserved)
    return f"{plan.mode.value}: {where}, {how}; {need} {limit} for pictures of {height} x {width}"
