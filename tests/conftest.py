"""What tests of several services share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

# Before anything imports torch, and inherited by every process that a test starts: threads that spin while they wait
# take the cores from the services under test, up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_END_TO_END = Path(__file__).parent / "e2e"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers a file's tests stay together, for its services; the end-to-end ones all share a stack."""
    for item in items:
        group = "e2e" if item.path.is_relative_to(_END_TO_END) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the tiny preset, all variants, written once a session. Tests must not change it."""
    from cli.checkpoints.synth import SynthRequest, synthesize

    # Folders of workers lie in one of the session's.
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "tiny"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            synthesize(SynthRequest("tiny", unfinished), on_file=lambda name, size: None)
            unfinished.rename(folder)
    return folder
