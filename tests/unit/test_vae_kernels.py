"""The fused video decoder makes the same pictures as plain PyTorch; Triton's interpreter runs its kernels on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from services.vae.model.video_layers import ReferenceOps
from services.vae.ops import Kernels, select_ops
from tests.unit.test_vae_decoder import TOLERANCE


def test_fused_pictures_are_the_reference_ones() -> None:
    """The whole picture in steps of two latent frames, the last a single one, and two stripes in steps of one."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.interpreted_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    errors = {case: float(error) for case, error in (line.split() for line in done.stdout.splitlines())}
    assert list(errors) == ["whole", "stripes"]
    assert all(error < TOLERANCE for error in errors.values()), errors


def test_fused_kernels_are_refused_where_they_cannot_run() -> None:
    cpu = torch.device("cpu")
    assert isinstance(select_ops(cpu), ReferenceOps)
    with pytest.raises(ValueError, match="CUDA"):
        select_ops(cpu, Kernels.FUSED)
