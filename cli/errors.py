"""What the command can fail with, how that is said, and the exit status of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer
from rich.console import Console

from shared.errors import FieldViolation, InvalidRequest, NotFound, OviError

EXIT_FAILED = 1
"""The work was begun and failed."""
EXIT_BAD_INPUT = 2
"""A flag, a file or a field is wrong; nothing was done."""
EXIT_INTERRUPTED = 130
"""Ctrl-C or SIGTERM, after cleaning up."""

_FLAGS: Mapping[str, str] = {
    "prompt": "PROMPT",
    "video_negative_prompt": "--negative-prompt",
    "audio_negative_prompt": "--audio-negative-prompt",
    "model": "--model",
    "height": "--size",
    "width": "--size",
    "image_id": "--image",
    "image": "--image",
    "num_inference_steps": "--steps",
    "video_guidance_scale": "--guidance",
    "audio_guidance_scale": "--audio-guidance",
    "flow_shift": "--shift",
    "solver": "--solver",
    "slg_layer": "--slg-layer",
    "seed": "--seed",
    "step_cache_threshold": "--step-cache",
    "vram_mode": "--vram-mode",
}


class UsageProblem(Exception):
    """A flag or a file the user gave is wrong; the message names it and says what to do."""


class CommandFailed(Exception):
    """The work was begun and failed; `exit_status` is the command's."""

    def __init__(self, message: str, *, exit_status: int = EXIT_FAILED) -> None:
        self.exit_status = exit_status
        super().__init__(message)


def say_error(message: str) -> None:
    """Red on stderr, unwrapped, taken literally."""
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Around a command's body: expected failures become a message and an exit status.

    Raises:
        typer.Exit: with EXIT_BAD_INPUT, EXIT_INTERRUPTED, or the failure's own status.
    """
    try:
        yield
    except InvalidRequest as error:
        for violation in error.violations:
            say_error(f"{_flag_of(violation)}: {violation.description}")
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except UsageProblem as error:
        say_error(str(error))
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except NotFound as error:
        say_error(error.message)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except OviError as error:
        say_error(f"{error.message} ({error.code})")
        raise typer.Exit(EXIT_FAILED) from None
    except CommandFailed as error:
        say_error(str(error))
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _flag_of(violation: FieldViolation) -> str:
    name = violation.field.rpartition(".")[2]
    flag = _FLAGS.get(name)
    return f"{flag} ({violation.field})" if flag else violation.field
