"""Which checkpoint folder a stack runs on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cli.errors import UsageProblem
from shared.variants import TEXT_ENCODER_FILE, VARIANTS, VIDEO_VAE_FILE

DEFAULT_FOLDER = Path("checkpoints")
TINY = "tiny"

_MARKS = (TEXT_ENCODER_FILE, VIDEO_VAE_FILE, *(variant.file for variant in VARIANTS.values()))


def holds_release(folder: Path) -> bool:
    """True if any of the main files of the released layout is there."""
    return any((folder / mark).is_file() for mark in _MARKS)


def choose_checkpoints(
    checkpoints: Path | None, preset: str | None, data_dir: Path, say: Callable[[str], None]
) -> Path:
    """The folder named by the flags; else ./checkpoints if it holds released files; else the tiny preset.

    Args:
        checkpoints: value of --checkpoints.
        preset: value of --preset; its files are made in the data folder the first time.
        data_dir: where they are made.
        say: told about a choice the user did not make.

    Raises:
        UsageProblem: both flags, an unknown preset, a folder without any of the files, or an unwritable data folder.
    """
    if checkpoints is not None and preset is not None:
        raise UsageProblem("--checkpoints and --preset exclude each other; give one of them")
    if preset not in (None, TINY):
        raise UsageProblem(
            f"--preset: got {preset!r}, allowed is {TINY!r}; for a full-size synthetic model run"
            " `ovi models synth --preset full --out DIR` once, then give --checkpoints DIR"
        )
    if checkpoints is not None:
        if not holds_release(checkpoints):
            raise UsageProblem(
                f"--checkpoints: {checkpoints} holds none of {', '.join(_MARKS)};"
                " `ovi models check DIR` tells what a folder lacks"
            )
        return checkpoints.resolve()
    if preset is None and holds_release(DEFAULT_FOLDER):
        return DEFAULT_FOLDER.resolve()
    if preset is None:
        say(f"No weights in ./{DEFAULT_FOLDER}: using the tiny random model, which makes noise, not pictures.")
    return _tiny(data_dir / "checkpoints" / TINY, say)


def _tiny(folder: Path, say: Callable[[str], None]) -> Path:
    if folder.is_dir():
        return folder.resolve()
    # Heavy (torch), and needed the first time only.
    from cli.checkpoints.synth import SynthRequest, synthesize

    partial = folder.with_name(f".{folder.name}.partial")
    say(f"Writing the tiny checkpoint into {folder} (once).")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        synthesize(SynthRequest(TINY, partial), on_file=lambda name, size: None)
        partial.rename(folder)
    except OSError as error:
        raise UsageProblem(f"--data-dir: {folder} cannot be written ({error.strerror})") from None
    return folder.resolve()
