"""The choices of a sampling run, their defaults and their limits; used by the gateway before queueing and by fusion."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from shared.errors import FieldViolation

MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 30.0
MAX_FLOW_SHIFT = 100.0
MAX_STEP_CACHE_THRESHOLD = 1.0


class Solver(enum.Enum):
    """Solver of the flow; values are the names the Ovi community uses."""

    UNIPC = "unipc"
    DPMPP = "dpm++"
    EULER = "euler"


@dataclass(frozen=True)
class SamplingOptions:
    """Solver, guidance and seed of one run; defaults of the release (arXiv 2510.01284)."""

    num_inference_steps: int = 50
    video_guidance_scale: float = 4.0
    """1 means no guidance of the video tower."""
    audio_guidance_scale: float = 3.0
    """1 means no guidance of the audio tower."""
    flow_shift: float = 5.0
    solver: Solver = Solver.UNIPC
    slg_layer: int = 11
    """Block left out of the negative pass; 0 leaves none out."""
    seed: int = 100
    step_cache_threshold: float = 0.0
    """Relative change of the first block's output below which a step reuses the others' of an earlier one; lossy.

    0: every step is computed.
    """

    @property
    def needs_negative_pass(self) -> bool:
        """False only where the negative prediction has no weight: both scales 1. (neg + 1 * (pos - neg) = pos.)"""
        return self.video_guidance_scale != 1.0 or self.audio_guidance_scale != 1.0


def check_sampling_options(options: SamplingOptions, *, num_layers: int, prefix: str) -> list[FieldViolation]:
    """Every violation of the limits, with `prefix` before each field name; empty if all is well."""
    violations = []

    def check(field: str, ok: bool, value: object, allowed: str) -> None:
        if not ok:
            violations.append(FieldViolation(prefix + field, f"got {value}, allowed is {allowed}"))

    steps = options.num_inference_steps
    check("num_inference_steps", 1 <= steps <= MAX_STEPS, steps, f"1 to {MAX_STEPS}")
    for field in ("video_guidance_scale", "audio_guidance_scale"):
        scale = getattr(options, field)
        check(field, math.isfinite(scale) and 1.0 <= scale <= MAX_GUIDANCE, scale, f"1 to {MAX_GUIDANCE:g}")
    shift = options.flow_shift
    ok = math.isfinite(shift) and 0.0 < shift <= MAX_FLOW_SHIFT
    check("flow_shift", ok, shift, f"above 0 to {MAX_FLOW_SHIFT:g}")
    layer = options.slg_layer
    check("slg_layer", 0 <= layer < num_layers, layer, f"0 (off) to {num_layers - 1}")
    check("seed", 0 <= options.seed <= MAX_SEED, options.seed, f"0 to {MAX_SEED}")
    threshold = options.step_cache_threshold
    ok = math.isfinite(threshold) and 0.0 <= threshold <= MAX_STEP_CACHE_THRESHOLD
    check("step_cache_threshold", ok, threshold, f"0 (off) to {MAX_STEP_CACHE_THRESHOLD:g}")
    return violations
