"""The fusion model, its solvers and whole runs reproduce the golden vectors."""

from pathlib import Path

import pytest

from tests.parity import fusion

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("part", [fusion.model_comparisons, fusion.scheduler_comparisons, fusion.pipeline_comparisons])
def test_golden(part) -> None:
    comparisons = list(part(GOLDEN))
    assert comparisons
    assert not [str(c) for c in comparisons if not c.passed]
