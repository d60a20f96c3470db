"""The VAE service's networks reproduce the golden vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import audio_vae, video_vae

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("module", [video_vae, audio_vae], ids=["video_vae", "audio_vae"])
def test_golden_vectors_are_reproduced(module: type[video_vae]) -> None:
    results = list(module.comparisons(GOLDEN))
    assert len(results) >= 6
    assert not [str(result) for result in results if not result.passed]
