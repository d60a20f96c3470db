"""Figures that ours are held against: another public implementation on the same GPU, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass

DEVICE = "NVIDIA H200"
SOURCE = (
    "another public implementation on an H200 (random weights, bfloat16, cuDNN attention; one guided step is two"
    " passes; VAE decode of the whole clip)"
)


@dataclass(frozen=True)
class Figures:
    """Seconds by number of GPUs."""

    reference_step_s: dict[int, float]
    reference_decode_s: dict[int, float]
    goal_step_s: dict[int, float]
    goal_fp8_step_s: dict[int, float]
    goal_decode_s: dict[int, float]


FIGURES = {
    "720x720_5s": Figures(
        {1: 1.404, 4: 0.711, 8: 0.677}, {1: 5.3}, {1: 0.80, 2: 0.41, 8: 0.13}, {1: 0.62}, {1: 1.8, 8: 0.4}
    ),
    "960x960_5s": Figures(
        {1: 2.854, 4: 1.089, 8: 0.890}, {1: 9.3}, {1: 1.90, 2: 0.97, 8: 0.29}, {1: 1.55}, {1: 3.2, 8: 0.7}
    ),
    "960x960_10s": Figures(
        {1: 7.325, 4: 2.317, 8: 1.375}, {1: 18.6}, {1: 5.7, 2: 2.9, 8: 0.82}, {1: 5.0}, {1: 6.4, 8: 1.3}
    ),
}
