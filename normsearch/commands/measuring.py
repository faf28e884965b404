"""Commands that measure: compare, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import normsearch
from normsearch.arguments import make_inputs
from normsearch.commands.options import Arch, Arguments, Batch, Entry, Inputs, Json, Logits, MaybeFile, Shape
from normsearch.commands.running import OUT, loaded_from, needs_inputs, progress, reported


@reported
def compare(
    before: Annotated[Path, typer.Argument(help="The checkpoint before.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The checkpoint after.", show_default=False)],
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 8,
    logits: Logits = False,
    as_json: Json = False,
) -> None:
    """Measure how two checkpoints of one network differ."""
    needs_inputs(input_shape, inputs)
    first = loaded_from(before, architecture, arguments, entry)
    second = loaded_from(after, architecture, arguments, None)
    with progress("comparing"):
        given = make_inputs(first.model, input_shape, batch_size, inputs)
        report = normsearch.compare(first.model, second.model, [given], logits=logits)
    typer.echo(report.to_json()) if as_json else OUT.print(report)


@reported
def profile(
    checkpoint: MaybeFile = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed passes.")] = 10,
    as_json: Json = False,
) -> None:
    """Measure latency and memory of a forward pass."""
    needs_inputs(input_shape, inputs)
    loaded = loaded_from(checkpoint, architecture, arguments, entry)
    with progress("measuring"):
        given = make_inputs(loaded.model, input_shape, batch_size, inputs)
        found = normsearch.profile(loaded.model, given, repeats=repeats)
    typer.echo(found.to_json()) if as_json else OUT.print(found)
