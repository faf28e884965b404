"""The command line: files in, files out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

#: In which module each command is, and what it does. Torch takes two seconds to import: this list needs none.
COMMANDS = {
    "methods": ("inspecting", "List the normalization methods."),
    "architectures": ("inspecting", "List the architectures that are known by name."),
    "sites": ("inspecting", "List the places where a network normalizes."),
    "plan": ("inspecting", "Say which method would stand at each site, and why not; change nothing."),
    "convert": ("converting", "Replace the BatchNorm layers of a checkpoint and write the converted one."),
    "compare": ("measuring", "Measure how two checkpoints of one network differ."),
    "profile": ("measuring", "Measure latency and memory of a forward pass."),
    "sensitivity": ("reporting", "Measure how far the output moves when a single site gets another method."),
    "calibrate": (
        "calibrating",
        "Bring a converted checkpoint back to its original with a few unlabelled inputs.",
    ),
    "report": ("reporting", "Report what a conversion changed, as one HTML page and as JSON."),
    "search": ("searching", "Search the normalization method of every site."),
    "worker": ("searching", "Run trials of a search that was started elsewhere."),
    "status": ("searching", "Say how far a search has come that goes on elsewhere, or was interrupted."),
}
_OPTIONS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}


class Commands(TyperGroup):
    """Imports a command when it is called."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        # What a misspelled name is compared with.
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; None if there is no such."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"normsearch.commands.{COMMANDS[cmd_name][0]}")
        alone = typer.Typer(**_OPTIONS)
        alone.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, does) for name, (_, does) in COMMANDS.items()])


app = typer.Typer(cls=Commands, no_args_is_help=True, **_OPTIONS)


@app.callback()
def _all() -> None:
    """Replace the BatchNorm layers of a trained network by any other normalization."""


def main() -> None:
    """Run the command line."""
    app()
