"""What the text encoder takes of its process's device, and where a memory mode puts its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from services.text_encoder.checkpoint import infer_config
from services.text_encoder.config import MAX_TOKENS, TextEncoderOptions
from shared.checkpoints import layout_of, read_pth
from shared.device_memory import device_facts, free_to_take, limit_memory
from shared.errors import InvalidRequest, OutOfMemory
from shared.memory.choose import TextEncoderPlan, choose_mode, gib
from shared.memory.estimate import Components, estimate_text_encoder
from shared.memory.modes import LOWER, RECIPES, TextEncoderPlace, VramMode
from shared.memory.sizes import RELEASED_TEXT_ENCODER, TextEncoderSizes
from shared.variants import TEXT_ENCODER_FILE


@dataclass(frozen=True)
class TextEncoderMemory:
    """Plans for one device."""

    device: torch.device
    sizes: TextEncoderSizes
    budget_bytes: int | None
    """What this process's allocator may reserve; None: nothing limits it."""

    @classmethod
    def of(cls, options: TextEncoderOptions) -> TextEncoderMemory:
        """By the flags of the service; a limit that they set is enforced from now on.

        Raises:
            CheckpointError: the weight file is damaged, or is none of a umT5 encoder.
        """
        stage = options.stage
        if stage.memory_bytes is not None:
            limit_memory(stage.device, stage.memory_bytes)
        budget = free_to_take(stage.device) if stage.memory_bytes is None else stage.memory_bytes
        path, sizes = stage.checkpoints / TEXT_ENCODER_FILE, RELEASED_TEXT_ENCODER
        if path.is_file():  # if not, loading says so
            widths = asdict(infer_config(path, layout_of(read_pth(path))))
            sizes = TextEncoderSizes.of_widths(**widths, max_tokens=MAX_TOKENS, itemsize=stage.precision.itemsize)
        return cls(stage.device, sizes, budget)

    def place(self, mode: VramMode) -> TextEncoderPlace:
        """Where the layers are in a mode that has a name.

        A process on a CPU stays there. One on a GPU has its context there already, so where the mode wants the CPU, its
        layers are streamed: that takes little more of the GPU, and a hundredth of the time.
        """
        if self.device.type == "cpu":
            return TextEncoderPlace.CPU
        place = RECIPES[mode].text_encoder
        return TextEncoderPlace.STREAMED if place is TextEncoderPlace.CPU else place

    def takes_turns(self, mode: VramMode) -> bool:
        """Whether the device is used in turns with other stages."""
        return self.place(mode) is TextEncoderPlace.STREAMED

    def components(self, mode: VramMode) -> Components:
        """What a mode that has a name takes, whether it fits or not."""
        return estimate_text_encoder(self.sizes, self.place(mode))

    def plan(self, mode: VramMode) -> TextEncoderPlan:
        """Where a mode that has a name puts the layers.

        Raises:
            OutOfMemory: they do not fit there; with the numbers and the mode that would.
            InvalidRequest: the mode is not for this device.
        """
        if problem := mode_problem(mode, self.device):
            raise InvalidRequest.of("vram_mode", problem)
        components = self.components(mode)
        if self.budget_bytes is not None and components.reserved > self.budget_bytes:
            raise self._refusal(mode, self.budget_bytes)
        return TextEncoderPlan(mode, self.place(mode), components, self.budget_bytes)

    def settle(self, mode: VramMode) -> VramMode:
        """A mode that has a name and fits.

        Args:
            mode: AUTO: the best one.

        Raises:
            OutOfMemory: see `plan`, as for the next.
            InvalidRequest: see there.
        """
        if mode is not VramMode.AUTO:
            return self.plan(mode).mode
        if self.device.type == "cpu":
            return VramMode.STANDARD
        return choose_mode(device_facts(self.device), self.plan).mode

    def explain(self, mode: VramMode) -> str:
        """A plan in one line."""
        where = {
            TextEncoderPlace.RESIDENT: "layers stay on the device",
            TextEncoderPlace.STREAMED: "layers pass through the device in turns",
            TextEncoderPlace.CPU: "on the CPU",
        }[self.place(mode)]
        limit = "no limit" if self.budget_bytes is None else f"of {gib(self.budget_bytes)}"
        return f"{mode.value}: {where}; {gib(self.components(mode).reserved)} {limit}"

    def _refusal(self, mode: VramMode, budget_bytes: int) -> OutOfMemory:
        need = gib(self.components(mode).reserved)
        fitting = [other for other in LOWER[mode] if self.components(other).reserved <= budget_bytes]
        advice = f"{fitting[0].value} fits" if fitting else "run the text encoder on the CPU"
        what = f"{mode.value} needs {need} on {self.device} for the text encoder, {gib(budget_bytes)} may be used"
        return OutOfMemory(f"{what}; {advice}")


def mode_problem(mode: VramMode, device: torch.device) -> str | None:
    """Why a mode is not for this device; None if it is."""
    if mode is VramMode.ALL_GPU and device.type == "cpu":
        return "got all_gpu, which keeps everything on a GPU, and the device is a CPU; allowed is standard, or a GPU"
    return None
