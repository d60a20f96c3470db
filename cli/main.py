"""The `ovi` command."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from cli.checkpoints.commands import models_app
from cli.connection import (
    ApiKey,
    ConnectionFlagsAnywhere,
    Insecure,
    TlsCa,
    TlsCert,
    TlsKey,
    WithTls,
    choose_connection,
)
from cli.doctor import doctor
from cli.errors import errors_in_words
from cli.generate import generate
from cli.health import health
from cli.jobs import jobs_app
from cli.keys import keys_app
from cli.profiles import profiles
from cli.up import up
from cli.workers import workers

app = typer.Typer(
    name="ovi",
    cls=ConnectionFlagsAnywhere,
    help="Make short videos with sound, served by one gRPC service per model stage.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(up)
app.command()(generate)
app.add_typer(jobs_app, name="jobs")
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.command()(doctor)
app.command()(health)
app.command()(profiles)
app.command()(workers)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ovi-serve {version('ovi-serve')}")
        raise typer.Exit


@app.callback()
def root(
    api_key: ApiKey = None,
    with_tls: WithTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure: Insecure = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make short videos with sound, served by one gRPC service per model stage.

    The flags of the connection may also follow a command's name.
    """
    with errors_in_words():
        choose_connection(api_key, with_tls, tls_ca, tls_cert, tls_key, insecure)


if __name__ == "__main__":
    app()
