"""Every kernel of the video decoder, run by Triton's interpreter on a CPU, against plain PyTorch in float32.

`TRITON_INTERPRET=1 python -m tests.interpreted_kernels`: a line `case error` each. A process of its own, since Triton
reads that variable once, when it is first imported.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from services.vae import kernels
from services.vae.model.video_layers import ReferenceOps
from services.vae.ops import FusedOps
from tests.unit.test_vae_decoder import LockStep, decode, latent, random_network


class _OneAtATime:
    """The kernels for threads: the interpreter runs one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def join(self, *arguments: Any) -> None:
        with self._lock:
            kernels.join(*arguments)

    def pixels(self, *arguments: Any) -> None:
        with self._lock:
            kernels.pixels(*arguments)


def errors() -> Iterator[tuple[str, float]]:
    """The largest difference between pictures of both implementations, for every case."""
    network = random_network()
    whole = latent(4, 2, 1)
    expected = decode(network, ReferenceOps(), whole)
    yield "whole", (decode(network, FusedOps(kernels), whole) - expected).abs().max().item()
    fused = FusedOps(_OneAtATime(), latent_frames_per_step=1)
    striped = LockStep([1, 1]).run(lambda stripe, part: decode(network, fused, part, stripe), whole)
    yield "stripes", (striped - expected).abs().max().item()


def main() -> None:
    """Print a line for every case."""
    torch.set_num_threads(1)
    for case, error in errors():
        sys.stdout.write(f"{case} {error:.3e}\n")


if __name__ == "__main__":
    main()
