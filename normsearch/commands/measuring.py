"""Commands that measure: compare, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import normsearch
from normsearch.admission.programs import is_program
from normsearch.checkpoints import Checkpoint
from normsearch.commands import onnx_files
from normsearch.commands.options import (
    MEASURED,
    Arch,
    Arguments,
    Batch,
    Entry,
    ImageSize,
    Inputs,
    Json,
    Logits,
    MaybeFile,
    Mean,
    Shape,
    Std,
)
from normsearch.commands.running import (
    OUT,
    first_of,
    given_inputs,
    loaded_from,
    needs_inputs,
    progress,
    reported,
)


@reported
def compare(
    before: Annotated[Path, typer.Argument(help="The checkpoint before.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="The checkpoint after.", show_default=False)],
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = MEASURED,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    logits: Logits = False,
    as_json: Json = False,
) -> None:
    """Measure how two checkpoints of one network differ."""
    needs_inputs(input_shape, inputs)
    images = (image_size, mean, std)
    if onnx_files.is_onnx(before, after):
        onnx_files.refuse_options(architecture=architecture, arguments=arguments, entry=entry)
        report = onnx_files.compare(before, after, input_shape, inputs, batch_size, images, logits=logits)
        return typer.echo(report.to_json()) if as_json else OUT.print(report)
    first, second = _two(before, after, architecture, arguments, entry)
    given = given_inputs(first.model, input_shape, batch_size, inputs, images)
    assert given is not None
    with progress("comparing"):
        report = normsearch.compare(first.model, second.model, given, logits=logits)
    return typer.echo(report.to_json()) if as_json else OUT.print(report)


def _two(
    before: Path, after: Path, architecture: str | None, arguments: list[str] | None, entry: str | None
) -> tuple[Checkpoint, Checkpoint]:
    """Load both; of an exported program and a checkpoint, the options belong to the checkpoint."""
    given = (architecture, arguments, entry)
    if is_program(before) and not is_program(after):
        return loaded_from(before, None, None, None), loaded_from(after, *given)
    first = loaded_from(before, *given)
    if is_program(after) and not is_program(before):
        return first, loaded_from(after, None, None, None)
    return first, loaded_from(after, architecture, arguments, None)


@reported
def profile(
    checkpoint: MaybeFile = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 1,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed passes.")] = 10,
    as_json: Json = False,
) -> None:
    """Measure latency and memory of a forward pass."""
    needs_inputs(input_shape, inputs)
    loaded = loaded_from(checkpoint, architecture, arguments, entry)
    given = given_inputs(loaded.model, input_shape, batch_size, inputs, (image_size, mean, std))
    with progress("measuring"):
        found = normsearch.profile(loaded.model, first_of(given), repeats=repeats)
    if found.batch_size is not None and found.batch_size < batch_size:
        typer.echo(f"note: the inputs have {found.batch_size} samples, fewer than --batch-size", err=True)
    typer.echo(found.to_json()) if as_json else OUT.print(found)
