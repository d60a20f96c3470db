"""What tests of several services share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

# Before anything imports torch, and inherited by every process that a test starts: threads that spin while they wait
# take the cores from the services under test, up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _ByFile(LoadScopeScheduling):
    """A file's tests stay on one worker, for the services they share; the end-to-end ones all share a stack."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/e2e" if file.startswith("tests/e2e/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Of the workers of `make test`."""
    return _ByFile(config, log)


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
