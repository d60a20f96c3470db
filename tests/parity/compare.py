"""`python -m tests.parity.compare DIR`: every golden comparison of a folder, a line each; status 1 if any fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from services.fusion.ops import Kernels
from tests.parity import audio_vae, fusion, text_encoder, video_vae
from tests.parity.comparison import Comparison


def all_comparisons(golden: Path, place: fusion.Place) -> Iterator[Comparison]:
    """Every comparison of every module, as it is made."""
    yield from text_encoder.comparisons(golden)
    yield from fusion.comparisons(golden, place)
    yield from video_vae.comparisons(golden)
    yield from audio_vae.comparisons(golden)


def main(golden: Path, place: fusion.Place) -> int:
    """Print `file case output max_abs_err` a line; the exit status."""
    torch.manual_seed(0)
    done = []
    for comparison in all_comparisons(golden, place):
        sys.stdout.write(f"{comparison}\n")
        done.append(comparison)
    failed = sum(not comparison.passed for comparison in done)
    sys.stdout.write(f"{len(done) - failed} of {len(done)} comparisons within tolerance\n")
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.parity.compare")
    parser.add_argument("golden", type=Path, help="folder of golden .safetensors files")
    parser.add_argument("--device", type=torch.device, default="cpu", help="of the fusion model (default: cpu)")
    parser.add_argument(
        "--kernels", type=Kernels, default=Kernels.REFERENCE, help="of the fusion model: reference, fused"
    )
    given = parser.parse_args()
    if not given.golden.is_dir():
        parser.error(f"{given.golden} is no folder")
    sys.exit(main(given.golden, fusion.Place(given.device, given.kernels)))
