"""Temporary folders of clips: gone after the call, gone at the next start after a kill, left alone while in use."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from services.vae.scratch import remove_abandoned, scratch_folder
from shared.errors import DiskFull

_HOLDER = """
import sys
from services.vae.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "clip.mp4").write_bytes(b"half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def _holder() -> tuple[subprocess.Popen[str], Path]:
    root = Path(__file__).parent.parent.parent
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=pipe, stdout=pipe, text=True, cwd=root)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(temporary) -> None:
    (temporary / "somebody else's").mkdir()
    killed, left = _holder()
    living, used = _holder()
    with killed, living:
        assert (left / "clip.mp4").is_file() and left.parent == used.parent == temporary
        killed.kill()
        killed.wait()
        remove_abandoned()
        assert not left.exists() and (used / "clip.mp4").read_bytes() == b"half"
        living.communicate("")
    assert sorted(path.name for path in temporary.iterdir()) == ["somebody else's"]


def test_a_folder_goes_with_an_error_too(temporary) -> None:
    open_before = psutil.Process().num_fds()
    with pytest.raises(KeyError), scratch_folder() as folder:
        (folder / "clip.mp4").write_bytes(b"half")
        raise KeyError
    assert not list(temporary.iterdir())
    assert psutil.Process().num_fds() == open_before


def test_no_place_for_temporary_files_is_said(temporary, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(DiskFull, match="TMPDIR"), scratch_folder():
        pass
    remove_abandoned()
