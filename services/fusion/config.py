"""Options of the fusion service."""

from __future__ import annotations

from dataclasses import dataclass

from services.fusion.ops import Kernels
from shared.service_main import StageOptions


@dataclass(frozen=True)
class FusionOptions:
    """Flags of the fusion service, resolved."""

    stage: StageOptions
    model: str | None
    """Variant to load at start; None loads the first that the folder has."""
    kernels: Kernels
    """Implementations of the blocks' operations."""
