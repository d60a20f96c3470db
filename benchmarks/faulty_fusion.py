"""The fusion service with one fault: `python -m benchmarks.faulty_fusion --fault-file FILE [flags of services.fusion]`.

Once FILE exists, the rank whose number it holds removes it and runs out of memory in its next step.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import services.fusion.__main__
from services.fusion import engine
from services.fusion.sampling.denoise import Latents, Predictor, StepDone, denoise


def faulty(predict: Predictor, fault_file: Path, rank: str) -> Predictor:
    """The predictor, failing once the file names this rank."""

    def predict_or_fail(*args: Any, **kwargs: Any) -> tuple[Latents, Latents | None]:
        if fault_file.exists() and fault_file.read_text() == rank:
            fault_file.unlink()
            raise torch.OutOfMemoryError("out of memory, as the fault file asked")
        return predict(*args, **kwargs)

    return predict_or_fail


def main() -> None:
    """Put the fault in and run the service."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--fault-file", type=Path, required=True)
    args, sys.argv[1:] = parser.parse_known_args()
    rank = os.environ.get("RANK", "0")

    def denoise_with_fault(predict: Predictor, *rest: Any, **more: Any) -> Iterator[StepDone | Latents]:
        return denoise(faulty(predict, args.fault_file, rank), *rest, **more)

    engine.denoise = denoise_with_fault
    services.fusion.__main__.main()


if __name__ == "__main__":
    main()
