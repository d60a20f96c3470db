"""`ovi models synth` and `ovi models check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cli.errors import errors_in_words, say_error

models_app = typer.Typer(help="Checkpoint folders: make synthetic ones, check any.", no_args_is_help=True)

_EXIT_INCOMPLETE = 1


@models_app.command()
def synth(
    out: Annotated[Path, typer.Option(help="folder to fill; made if missing")],
    preset: Annotated[str, typer.Option(help="tiny: small widths for any machine; full: the released widths")] = "tiny",
    variants: Annotated[
        str | None, typer.Option(help="comma-separated fusion variants, for example 720x720_5s (default: all)")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same bytes")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace files that are there")] = False,
    link_variants: Annotated[
        bool, typer.Option("--link-variants", help="further bfloat16 variants are hard links to the first")
    ] = False,
) -> None:
    """Write seeded random weights in exactly the released files, keys, shapes and dtypes."""
    from cli.checkpoints.synth import SynthRequest, synthesize
    from shared.variants import VARIANTS

    console = Console()
    chosen = tuple(VARIANTS) if variants is None else tuple(v.strip() for v in variants.split(",") if v.strip())
    request = SynthRequest(preset, out, chosen, seed, force, link_variants)
    with errors_in_words(), console.status(f"writing the {escape(preset)} preset into {escape(str(out))}"):
        synthesize(request, on_file=lambda name, size: console.print(escape(name), _size(size)))


@models_app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a checkpoint folder in the released layout")],
) -> None:
    """Check every file, key, shape and dtype of a folder; status 1 if anything needed is missing or wrong."""
    from cli.checkpoints.check import Verdict, check_folder

    console = Console(highlight=False)
    report = check_folder(folder)
    colours = {Verdict.GOOD: "green", Verdict.ABSENT: "yellow", Verdict.MISSING: "red", Verdict.WRONG: "red"}
    console.print(escape(str(folder)), style="bold", soft_wrap=True)
    for file in report.files:
        verdict = f"[{colours[file.verdict]}]{file.verdict.value:7}[/]"
        console.print(f"{verdict}  {_size(file.num_bytes):>8}  {escape(file.name)}", soft_wrap=True)
        if file.description:
            console.print(f"{'':19}{escape(file.description)}", style="dim", soft_wrap=True)
    for problem in report.problems:
        say_error(problem)
    console.print(escape(report.summary), soft_wrap=True)
    if not report.complete:
        raise typer.Exit(_EXIT_INCOMPLETE)


def _size(num_bytes: int) -> str:
    from cli.words import size_text

    return size_text(num_bytes) if num_bytes else ""
