"""`python -m tests.parity.compare DIR`: every golden comparison of a folder, a line each; status 1 if any fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.parity import audio_vae, fusion, text_encoder, video_vae
from tests.parity.comparison import Comparison

MODULES = (text_encoder, fusion, video_vae, audio_vae)


def all_comparisons(golden: Path) -> Iterator[Comparison]:
    """Every comparison of every module, as it is made."""
    for module in MODULES:
        yield from module.comparisons(golden)


def main(golden: Path) -> int:
    """Print `file case output max_abs_err` a line; the exit status."""
    torch.manual_seed(0)
    done = []
    for comparison in all_comparisons(golden):
        sys.stdout.write(f"{comparison}\n")
        done.append(comparison)
    failed = sum(not comparison.passed for comparison in done)
    sys.stdout.write(f"{len(done) - failed} of {len(done)} comparisons within tolerance\n")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m tests.parity.compare DIR, a folder of golden .safetensors files")
    sys.exit(main(Path(sys.argv[1])))
