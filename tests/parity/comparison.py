"""One golden comparison, and the error measure all of them use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TOLERANCE = 2e-4
"""Largest absolute error of an fp32 output on a CPU."""
SCHEDULER_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One output of one case of one golden file against ours."""

    file: str
    case: str
    output: str
    max_abs_err: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.max_abs_err <= self.tolerance

    def __str__(self) -> str:
        verdict = "" if self.passed else f"  FAILED, allowed {self.tolerance:g}"
        return f"{self.file} {self.case} {self.output} {self.max_abs_err:.3e}{verdict}"


def max_abs_err(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest absolute difference in float64; NaN if any element is NaN, infinity if shapes differ."""
    if ours.shape != golden.shape:
        return float("inf")
    return (ours.double() - golden.double()).abs().max().item()


@dataclass(frozen=True)
class GoldenFile:
    """A golden file in memory."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> GoldenFile:
        """Read every tensor and the metadata."""
        with safe_open(path, framework="pt") as file:
            return cls({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118

    def json(self, key: str) -> Any:
        """A metadata entry, decoded."""
        return json.loads(self.metadata[key])

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
