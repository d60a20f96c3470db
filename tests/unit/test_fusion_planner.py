"""Which variants a memory mode is chosen for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.fusion.engine import FusionEngine
from services.fusion.planner import fusion_sizes, largest_clip
from shared.errors import OutOfMemory
from shared.memory.choose import least_fusion
from shared.memory.modes import VramMode
from tests.fusion_checkpoint import SMALL, write_variant

SHORT, LONG = "720x720_5s", "960x960_10s"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_variant(tmp_path, SHORT)
    write_variant(tmp_path, LONG)
    return tmp_path


def engine(folder: Path, mode: VramMode, memory_bytes: int | None) -> FusionEngine:
    return FusionEngine(folder, CPU, torch.float32, vram_mode=mode, memory_bytes=memory_bytes)


def least_bytes(folder: Path, model: str) -> int:
    unlimited = engine(folder, VramMode.STANDARD, None)
    unlimited.discover()
    tokens = largest_clip(unlimited.served[model])
    return least_fusion(fusion_sizes(SMALL, torch.float32.itemsize), tokens, VramMode.STANDARD).reserved


def test_a_variant_that_does_not_fit_leaves_the_others(folder: Path) -> None:
    enough_for_short = least_bytes(folder, SHORT)
    assert enough_for_short < least_bytes(folder, LONG)
    for mode in (VramMode.STANDARD, VramMode.AUTO):
        served = engine(folder, mode, enough_for_short)
        served.discover()
        assert served.mode is VramMode.STANDARD
        assert served.plan(SHORT).mode is VramMode.STANDARD
        with pytest.raises(OutOfMemory, match=rf"standard needs .* GiB on cpu for {LONG}, "):
            served.plan(LONG)


def test_where_no_variant_fits_the_smallest_says_what_it_lacks(folder: Path) -> None:
    too_little = engine(folder, VramMode.STANDARD, least_bytes(folder, SHORT) - 1)
    with pytest.raises(OutOfMemory, match=rf"standard needs .* GiB on cpu for {SHORT}, "):
        too_little.discover()
