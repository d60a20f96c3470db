"""Golden vectors of the text encoder, through the service's own loader and encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from services.text_encoder.checkpoint import load_encoder
from services.text_encoder.engine import TextEncoder
from tests.parity.comparison import Comparison, GoldenFile, max_abs_err

_CPU = torch.device("cpu")


def comparisons(golden: Path) -> Iterator[Comparison]:
    """Each prompt's rows, encoded alone from its unpadded ids, against the padded batch of the golden file."""
    file = GoldenFile.read(golden / "text_encoder.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "models_t5_umt5-xxl-enc-bf16.pth"
        torch.save(file.weights("weights."), weights)
        model, config = load_encoder(weights, device=_CPU, precision=torch.float32)
    encoder = TextEncoder(model, config, _CPU)
    for index, (ids, mask) in enumerate(zip(file.tensors["ids"], file.tensors["mask"], strict=True)):
        rows = encoder.encode(ids[mask.bool()].tolist())
        error = max_abs_err(rows, file.tensors[f"context.{index}"])
        yield Comparison("text_encoder", str(index), "context", error)
