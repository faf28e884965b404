"""How every command runs: errors, progress, output, and the checkpoint it works on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

import normsearch
from normsearch.arguments import read_architecture
from normsearch.checkpoints import Checkpoint, load
from normsearch.errors import CheckpointError, NormsearchError
from normsearch.files import refuse_existing
from normsearch.text import visible

OUT = Console()
ERR = Console(stderr=True)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn refusals into one message on stderr and exit code 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except NormsearchError as error:
            fail(str(error))
        except MemoryError:
            fail("out of memory; use a smaller batch, or convert without --report")
        except OSError as error:
            fail(f"{error.filename or 'the system'}: {error.strerror or error}")
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing half-written is left", err=True)
            raise typer.Exit(130) from None

    return run


def fail(message: str) -> None:
    """Print one message on stderr and leave with exit code 1."""
    # Names in files may hold terminal escapes.
    typer.echo(f"error: {visible(message)}", err=True)
    raise typer.Exit(1) from None


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show on a terminal that something takes its time."""
    with ERR.status(f"{what} ..."):
        yield


def loaded_from(
    checkpoint: Path | None, architecture: str | None, arguments: list[str] | None, entry: str | None
) -> Checkpoint:
    """Load a checkpoint, or build a network with fresh weights where there is none."""
    wanted = read_architecture(architecture, arguments or [])
    if checkpoint is None:
        if wanted is None:
            raise typer.BadParameter("give a checkpoint or an --architecture", param_hint="CHECKPOINT")
        with progress(f"building {wanted.name}"):
            model = normsearch.build(wanted, allow_factories=True).eval()
        return Checkpoint(model, wanted, None, ())
    with progress(f"loading {checkpoint}"):
        loaded = load(checkpoint, wanted, entry=entry, allow_factories=True)
    for note in loaded.notes:
        typer.echo(f"note: {note}", err=True)
    return loaded


def needs_inputs(shape: str | None, inputs: Path | None) -> None:
    """Raise a usage error without inputs."""
    if shape is None and inputs is None:
        raise typer.BadParameter("give --input-shape or --inputs", param_hint="--input-shape")


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))


def refuse_outputs(outputs: Sequence[Path | None], given: Sequence[Path | None], *, force: bool) -> None:
    """Raise before any work unless every output has a place of its own; ``--force`` never replaces an input.

    Raises:
        CheckpointError: two outputs share a path, one is an input, or one exists and not ``force``.

    """
    read = {path.resolve() for path in given if path is not None}
    seen: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in read:
            raise CheckpointError(
                f"{path} is read by this command and would be replaced; choose another name"
            )
        if path.resolve() in seen:
            raise CheckpointError(f"{path} would be written twice by this command; choose another name")
        seen.add(path.resolve())
        refuse_existing(path, force=force)
