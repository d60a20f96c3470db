"""The text encoder against its golden vectors."""

from __future__ import annotations

from pathlib import Path

from tests.parity.text_encoder import comparisons

_GOLDEN = Path(__file__).parents[1] / "golden"


def test_rows_equal_the_golden_vectors() -> None:
    found = list(comparisons(_GOLDEN))
    assert len(found) == 3
    failed = [str(comparison) for comparison in found if not comparison.passed]
    assert not failed, "\n".join(failed)
