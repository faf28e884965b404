"""The service's command line: serve, worker, and keys."""

from __future__ import annotations

import ipaddress
import json
import sys
import threading
from datetime import UTC, datetime
from typing import Annotated, NoReturn

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from api import keys
from api.confinement import forget_environment, hide
from api.database import Database
from api.main import create_app
from api.migrating import open_database
from api.observing import log_as_json
from api.problems import said
from api.server import run
from api.settings import Settings
from api.tools import await_database

#: Seconds for a database to answer that starts together with this process.
_PATIENCE = 60.0
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)
keys_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
app.add_typer(keys_app, name="keys")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve requests until told to stop; what is in work is finished first, for at most half a minute."""
    settings = _settings()
    if settings.open and not _is_loopback(host):
        _fail(
            f"NORMSEARCH_OPEN=1 needs no keys, so it listens on loopback alone, not on {host}; "
            "leave out --host, or make keys with `python -m api keys create` and unset NORMSEARCH_OPEN"
        )
    log_as_json()
    _await_database(settings)
    # Neither passwords in URLs nor tokens stay where another process could look.
    forget_environment("NORMSEARCH_")
    hide()
    run(create_app(settings, warm=True), host, port)


@app.command()
def worker(
    beside: Annotated[
        bool, typer.Option("--beside", hidden=True, help="Read the settings from the server that started it.")
    ] = False,
) -> None:
    """Run jobs until told to stop; what is in work is finished in some seconds, or given to others."""
    # DBOS takes a second to import.
    from api.worker import run as work

    log_as_json()
    told = threading.Event()
    if beside:
        settings = Settings(**json.loads(sys.stdin.readline() or "{}"))
        threading.Thread(target=_await_end, args=(told,), daemon=True).start()
    else:
        settings = _settings()
        forget_environment("NORMSEARCH_")
    hide()
    _await_database(settings)
    work(settings, told)


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is; for your own list.")],
    quota: Annotated[str | None, typer.Option(help="What it may store, for example 50GiB.")] = None,
) -> None:
    """Make a key and print its secret, which is shown this once."""
    try:
        size = None if quota is None else TypeAdapter(ByteSize).validate_python(quota)
    except ValidationError:
        _fail(f"--quota {quota!r} is no size; write for example 50GiB")
    if not name.isprintable() or not 0 < len(name) <= 200:
        _fail("a key's name has 1 to 200 printable characters")
    identifier, secret = keys.create(_database(), name, size)
    typer.echo(f"{identifier} for {name}; its secret follows and cannot be shown again", err=True)
    typer.echo(secret)


@keys_app.command(name="list")
def list_keys() -> None:
    """List the keys, without their secrets."""
    for key in keys.listed(_database()):
        state = "valid" if key.revoked_ms is None else f"revoked {_time(key.revoked_ms)}"
        quota = "" if key.quota_bytes is None else ByteSize(key.quota_bytes).human_readable()
        typer.echo("\t".join((key.id, key.name, _time(key.created_ms), state, quota)))


@keys_app.command()
def revoke(identifier: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")]) -> None:
    """Make a key useless from now on."""
    if not keys.revoke(_database(), identifier):
        _fail(f"there is no valid key {identifier!r}; `python -m api keys list` shows them")
    typer.echo(f"revoked {identifier}")


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            f"NORMSEARCH_{'_'.join(map(str, one['loc'])).upper()}: {said(one)}" for one in error.errors()
        ]
        _fail("; ".join(lines))


def _database() -> Database:
    settings = _settings()
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    return open_database(settings.url())


def _await_database(settings: Settings) -> None:
    reason = await_database(settings, _PATIENCE)
    if reason is not None:
        _fail(f"{reason}; see NORMSEARCH_DATABASE_URL")


def _await_end(told: threading.Event) -> None:
    """Wait until the server that started this process ends, or says that it will."""
    sys.stdin.read()
    told.set()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
