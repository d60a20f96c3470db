"""Options of the fusion service."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.fusion.ops import Execution, Kernels
from services.fusion.parallel.plan import ParallelPlan
from services.fusion.quantization import has_fp8_products
from shared.group.ranks import Ranks
from shared.memory.modes import RECIPES, VramMode, WeightFormat
from shared.service_main import StageOptions


@dataclass(frozen=True)
class FusionOptions:
    """Flags of the fusion service and what torchrun has set, resolved."""

    stage: StageOptions
    model: str | None
    """Variant to load at start; None loads the first that the folder has."""
    execution: Execution
    """How passes are computed."""
    ranks: Ranks
    """This process among those of the service."""
    plan: ParallelPlan
    """What the ranks share."""

    def __post_init__(self) -> None:
        if self.execution.graphs and (self.stage.device.type != "cuda" or self.plan.weights_degree > 1):
            raise ValueError("--graphs needs CUDA and a plan in which every GPU holds all weights; leave it out")
        if self.execution.kernels is Kernels.FUSED and self.stage.device.type != "cuda":
            raise ValueError(f"--kernels fused needs CUDA, the device is {self.stage.device}; leave it out")
        fp8_products = self.execution.weights is WeightFormat.FP8 and has_fp8_products(self.stage.device)
        if fp8_products and self.stage.precision is not torch.bfloat16:
            raise ValueError("--weights fp8 needs --precision bfloat16 on this GPU")
        mode = self.stage.vram_mode
        if mode is VramMode.AUTO:
            return
        if mode is VramMode.ALL_GPU and self.stage.device.type == "cpu":
            raise ValueError("--vram-mode all_gpu needs a GPU, the device is a CPU; use standard")
        if not RECIPES[mode].takes_turns:
            return
        if self.ranks.world_size > 1:
            what = f"--vram-mode {mode.value} is for one GPU, there are {self.ranks.world_size} ranks"
            raise ValueError(f"{what}; use standard, and --plan fsdp to share the weights")
        if self.execution.graphs:
            raise ValueError(
                f"--graphs needs weights that stay where they are; leave it out with --vram-mode {mode.value}"
            )
        if self.execution.weights is not WeightFormat.NATIVE:
            raise ValueError(f"--weights is what --vram-mode {mode.value} says itself; leave it out")
