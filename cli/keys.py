"""`ovi keys`: who may use a gateway. Works on the gateway's database itself, whether or not the gateway runs."""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import flags
from cli.errors import UsageProblem, errors_in_words
from services.gateway.auth.caller import KeyLimits, Role
from services.gateway.auth.keys import ApiKey, new_key

if TYPE_CHECKING:
    from services.gateway.auth.key_store import KeyStore

keys_app = typer.Typer(help="Make, list and revoke API keys of a gateway.", no_args_is_help=True)

DatabaseUrl = Annotated[
    str, typer.Option(envvar="OVI_DATABASE_URL", help="PostgreSQL of the gateways; else the file in the data folder.")
]


class _RoleName(enum.StrEnum):
    USER = Role.USER.value
    VIEWER = Role.VIEWER.value
    WORKER = Role.WORKER.value
    ADMIN = Role.ADMIN.value


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, for people.")],
    role: Annotated[
        _RoleName,
        typer.Option(
            help="viewer: reads all; user: makes jobs and sees its own; worker: registers workers; admin: everything."
        ),
    ] = _RoleName.USER,
    max_concurrent: Annotated[int | None, typer.Option(help="Jobs worked on at once.", show_default=False)] = None,
    max_daily: Annotated[int | None, typer.Option(help="Jobs a day.", show_default=False)] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Calls a minute. Default: the gateway's.", show_default=False)
    ] = None,
    data_dir: flags.DataDir = flags.DEFAULT_DATA_DIR,
    database_url: DatabaseUrl = "",
    as_json: flags.Json = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    with errors_in_words(), _key_store(data_dir, database_url) as store:
        try:
            limits = KeyLimits(max_concurrent, max_daily, requests_per_minute)
        except ValueError as error:
            raise UsageProblem(str(error)) from None
        key, secret = new_key(name, Role(role.value), limits)
        store.add(key)
        if as_json:
            typer.echo(json.dumps({**_described(key), "key": secret}))
            return
        Console(stderr=True).print(f"{key.id} ({key.role.value}) is made; this is the only time it is shown:")
        typer.echo(secret)


@keys_app.command("list")
def list_keys(
    data_dir: flags.DataDir = flags.DEFAULT_DATA_DIR, database_url: DatabaseUrl = "", as_json: flags.Json = False
) -> None:
    """All keys, oldest first, revoked ones too."""
    with errors_in_words(), _key_store(data_dir, database_url) as store:
        keys = store.all()
        if as_json:
            for key in keys:
                typer.echo(json.dumps(_described(key)))
            return
        table = Table(box=None, header_style="dim", pad_edge=False)
        for heading in ("id", "key", "role", "name", "limits", "made", "state"):
            table.add_column(heading, no_wrap=True)
        for key in keys:
            state = Text("good", "green") if key.revoke_time_s is None else Text(f"revoked {_day(key.revoke_time_s)}")
            made = _day(key.create_time_s)
            table.add_row(key.id, f"{key.prefix}_...", key.role.value, Text(key.name), _limits(key.limits), made, state)
        Console().print(table if keys else "No keys.")


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of the key; `ovi keys list` shows it.")],
    data_dir: flags.DataDir = flags.DEFAULT_DATA_DIR,
    database_url: DatabaseUrl = "",
) -> None:
    """End a key for good, on running gateways within seconds. Its jobs stay."""
    with errors_in_words(), _key_store(data_dir, database_url) as store:
        key = store.revoke(key_id)
        typer.echo(f"{key.id} ({key.name}) is revoked")


@contextlib.contextmanager
def _key_store(data_dir: flags.DataDir, url_text: str) -> Iterator[KeyStore]:
    # Databases take a second to import, which the other commands need not wait for.
    import sqlalchemy as sa

    from services.gateway.auth.key_store import KeyStore
    from services.gateway.database import DATABASE_FILE, database_url, open_database, open_postgres
    from services.gateway.migrations import migrate

    try:
        url = database_url(url_text)
        if url is None:
            data_dir.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise UsageProblem(str(error)) from None
    except OSError as error:
        raise UsageProblem(f"--data-dir: {data_dir} cannot be written ({error.strerror}); choose another") from None
    engine = open_postgres(url) if url is not None else open_database(data_dir / DATABASE_FILE)
    try:
        migrate(engine)
        yield KeyStore(engine)
    except sa.exc.DBAPIError as error:
        where = url if url is not None else data_dir / DATABASE_FILE
        raise UsageProblem(f"the database {where} cannot be used ({error.orig})") from None
    finally:
        engine.dispose()


def _described(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "name": key.name,
        "role": key.role.value,
        "max_concurrent": key.limits.max_concurrent_jobs,
        "max_daily": key.limits.max_daily_jobs,
        "requests_per_minute": key.limits.requests_per_minute,
        "create_time": _iso(key.create_time_s),
        "revoke_time": None if key.revoke_time_s is None else _iso(key.revoke_time_s),
    }


def _limits(limits: KeyLimits) -> str:
    words = (
        (limits.max_concurrent_jobs, "at once"),
        (limits.max_daily_jobs, "a day"),
        (limits.requests_per_minute, "calls a minute"),
    )
    return ", ".join(f"{number} {what}" for number, what in words if number is not None) or "none"


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).astimezone().isoformat(timespec="seconds")


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d")
