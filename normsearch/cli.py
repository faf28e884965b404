"""The command line: files in, files out."""

from __future__ import annotations

import typer

from normsearch.commands.calibrating import calibrate
from normsearch.commands.converting import convert
from normsearch.commands.inspecting import architectures, methods, plan, sites
from normsearch.commands.measuring import compare, profile
from normsearch.commands.reporting import report, sensitivity
from normsearch.commands.searching import search, worker

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replace the BatchNorm layers of a trained network by any other normalization.",
)
for command in (
    methods,
    architectures,
    sites,
    plan,
    convert,
    compare,
    profile,
    sensitivity,
    calibrate,
    report,
    search,
    worker,
):
    app.command()(command)


def main() -> None:
    """Run the command line."""
    app()
