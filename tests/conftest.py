"""What tests of several services share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch, and inherited by every process that a test starts: threads that spin while they wait
# take the cores from the services under test, up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny preset, all variants, written once a session. Tests must not change it."""
    from cli.checkpoints.synth import SynthRequest, synthesize

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    synthesize(SynthRequest("tiny", folder), on_file=lambda name, size: None)
    return folder
