"""How every command runs: errors, progress, output, and the checkpoint it works on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from torch.export import ExportedProgram

import normsearch
from normsearch.arguments import read_architecture, read_batches, read_preparation
from normsearch.checkpoints import Checkpoint, load
from normsearch.commands.wording import in_options
from normsearch.errors import CheckpointError, NormsearchError
from normsearch.files import refuse_existing
from normsearch.inputs import Batches
from normsearch.opening import Model
from normsearch.plans import Plan
from normsearch.progress import OnProgress
from normsearch.tables import Listing
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
            fail(in_options(str(error)))
        except MemoryError:
            fail("out of memory; use a smaller batch, or convert without --report")
        except BrokenPipeError:
            # Who read the output has seen enough (`| head`); typer ends quietly.
            raise
        except OSError as error:
            fail(f"{error.filename or 'the system'}: {error.strerror or error}")
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing half-written is left", err=True)
            raise typer.Exit(130) from None

    return run


def fail(message: str) -> NoReturn:
    """Print one message on stderr and leave with exit code 1."""
    # Names in files may hold terminal escapes.
    typer.echo(f"error: {visible(message)}", err=True)
    raise typer.Exit(1) from None


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show on a terminal that something takes its time."""
    with ERR.status(f"{what} ..."):
        yield


#: Seconds between two lines about the same stage where there is no terminal.
_LINE_EVERY = 10.0


@contextmanager
def following(*, lines: bool = False) -> Iterator[OnProgress]:
    """Show on a terminal how far work in stages has come, what it found, and how long it still takes.

    Args:
        lines: where stderr is no terminal, write a line now and then; for work that takes hours.

    """
    if lines and not ERR.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[detail]}", style="dim"),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as shown:

        def follow(step: normsearch.Progress) -> None:
            total = step.total or None
            if step.stage not in bars:
                bars[step.stage] = shown.add_task(escape(step.stage), total=total, left="", detail="")
            left = "" if step.seconds_left is None else f"{_duration(step.seconds_left)} left"
            shown.update(
                bars[step.stage],
                completed=step.done,
                total=total,
                left=left,
                detail=escape(visible(step.detail)),
            )

        yield follow


class _Lines:
    """Progress as lines for a log: each stage's first and last step, and one every few seconds."""

    def __init__(self) -> None:
        self._stage = ""
        self._last = -math.inf

    def __call__(self, step: normsearch.Progress) -> None:
        now = time.monotonic()
        ends = step.total > 0 and step.done >= step.total
        if step.stage == self._stage and now - self._last < _LINE_EVERY and not ends:
            return
        self._stage, self._last = step.stage, now
        of = f" {step.done}/{step.total}" if step.total else f" {step.done}"
        left = "" if step.seconds_left is None or ends else f"{_duration(step.seconds_left)} left"
        typer.echo(visible(", ".join(filter(None, (step.stage + of, left, step.detail)))), err=True)


def _duration(seconds: float) -> str:
    """Return a time as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show(listing: Listing) -> None:
    """Print a listing in the words of the command line."""
    rows = [tuple(in_options(text) for text in row) for row in listing.rows]
    OUT.print(replace(listing, rows=rows, notes=[in_options(note) for note in listing.notes]))


def given_inputs(
    model: Model,
    shape: str | None,
    batch_size: int,
    inputs: Path | None,
    images: tuple[int | None, str | None, str | None],
    samples: int | None = None,
    *,
    held_apart: bool = False,
    only: int | None = None,
) -> Batches | None:
    """Return the inputs that the options ask for, and say on stderr what was done to them.

    Args:
        model: what they are for.
        shape: ``--input-shape``.
        batch_size: ``--batch-size``.
        inputs: ``--inputs``.
        images: ``--image-size``, ``--mean`` and ``--std``.
        samples: the most samples.
        held_apart: whether there must be a batch that can be held out.
        only: the only batch size that the model takes, if there is one.

    """
    preparation = read_preparation(*images)
    found = read_batches(model, shape, only or batch_size, inputs, preparation, samples=samples)
    if only is not None and found is not None:
        if found.samples is not None and found.samples % only:
            whole = found.samples // only * only
            if not whole:
                fail(f"the model takes batches of {only} samples, and {found.samples} are given; give more")
            found = read_batches(model, shape, only, inputs, preparation, samples=whole)
            assert found is not None
        found = replace(found, notes=(*found.notes, f"the model takes batches of {only} samples alone"))
    elif found is not None and held_apart:
        found = found.held_apart()
    for note in () if found is None else found.notes:
        typer.echo(f"note: {visible(note)}", err=True)
    return found


def first_of(batches: Batches | None) -> Any:
    """Return the inputs of one forward pass; None without any."""
    return None if batches is None else next(iter(batches))


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
        typer.echo(f"note: {in_options(note)}", err=True)
    return loaded


def name_of(checkpoint: Checkpoint, path: Path) -> str:
    """Return what a report is called: the network's name, or the file's of an exported program."""
    return path.name if checkpoint.architecture is None else str(checkpoint.architecture)


def converted_from(path: Path, original: Checkpoint) -> tuple[Model, Plan]:
    """Load the converted form of a checkpoint, and the plan that it was converted with.

    Raises:
        CheckpointError: the file does not say how it was converted, or the original was converted too.

    """
    if original.plan is not None and original.plan.changes:
        fail("the first checkpoint is converted; give the original first, then the converted one")
    with progress(f"loading {path}"):
        # What built the original was named by the user, or is in a registry: no code that a file names.
        loaded = load(path, original.architecture, allow_factories=True)
    if loaded.plan is None:
        fail(f"{path} does not say how it was converted; give what `normsearch convert -o` wrote")
    if isinstance(loaded.model, ExportedProgram) != isinstance(original.model, ExportedProgram):
        fail(f"{path} and the original are of two kinds; give two exported programs, or two checkpoints")
    return loaded.model, loaded.plan


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
