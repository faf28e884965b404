"""The command that converts a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

import normsearch
from normsearch.architectures import Architecture
from normsearch.arguments import make_inputs, read_plan, read_to
from normsearch.checkpoints import Checkpoint, save
from normsearch.commands.options import (
    Arch,
    Arguments,
    Batch,
    Entry,
    File,
    Force,
    Inputs,
    Json,
    Keep,
    Logits,
    Methods,
    Shape,
)
from normsearch.commands.running import (
    OUT,
    fail,
    loaded_from,
    print_json,
    progress,
    refuse_outputs,
    reported,
)
from normsearch.errors import NormsearchError
from normsearch.files import write_text
from normsearch.plans import Plan
from normsearch.rebuilding import LAYERS, SCRIPT, scripts


@reported
def convert(
    checkpoint: File,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The converted checkpoint, .safetensors.")
    ] = None,
    to: Methods = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan written by `normsearch plan -o`.")
    ] = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    keep: Annotated[Keep, typer.Option(help="What new layers keep of the old ones.")] = Keep.FUNCTION,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 4,
    report: Annotated[
        Path | None, typer.Option(help="Write what changed as JSON; needs --inputs or --input-shape.")
    ] = None,
    logits: Logits = False,
    script: Annotated[
        bool, typer.Option(help=f"Write {SCRIPT}, which rebuilds the network without normsearch.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace the BatchNorm layers of a checkpoint and write the converted one.

    normsearch convert resnet50.pth --architecture torchvision/resnet50 --to group -o out.safetensors
    """
    if bool(to) == (plan_file is not None):
        raise typer.BadParameter("give either --to or --plan", param_hint="--to")
    if output is None and not dry_run:
        raise typer.BadParameter("say where to write, for example -o out.safetensors", param_hint="--output")
    if report is not None and input_shape is None and inputs is None:
        raise typer.BadParameter("a report needs --input-shape or --inputs", param_hint="--report")
    if output is not None and not dry_run:
        # Before the work, not after it.
        beside = [output.with_name(SCRIPT), output.with_name(LAYERS)] if script else []
        refuse_outputs([output, report, *beside], [checkpoint, plan_file, inputs], force=force)
    loaded = loaded_from(checkpoint, architecture, arguments, entry)
    if loaded.plan is not None and loaded.plan.changes:
        fail(f"{checkpoint} is converted already; convert the checkpoint that it was made from")
    result = _convert(
        loaded, to, plan_file, keep, (input_shape, batch_size, inputs), report is not None, logits
    )
    written = []
    if not dry_run:
        assert output is not None
        with progress(f"writing {output}"):
            written = _write(result, loaded.architecture, output, report, script=script, force=force)
    if as_json:
        return print_json(
            {
                "written": [str(path) for path in written],
                "notes": loaded.notes,
                "plan": json.loads(result.plan.to_json()),
                "report": None if result.report is None else json.loads(result.report.to_json()),
            }
        )
    OUT.print(result.plan)
    if result.report is not None:
        OUT.print(result.report)
    typer.echo("nothing written (--dry-run)" if dry_run else f"wrote {', '.join(map(str, written))}")
    return None


@dataclass(frozen=True)
class _Result:
    model: nn.Module
    plan: Plan
    report: normsearch.Report | None


def _convert(
    loaded: Checkpoint,
    to: list[str] | None,
    plan_file: Path | None,
    keep: Keep,
    given: tuple[str | None, int, Path | None],
    compared: bool,
    logits: bool,
) -> _Result:
    model, (shape, batch, file) = loaded.model, given
    with progress("converting"):
        inputs = make_inputs(model, shape, batch, file)
        if plan_file is not None:
            made = read_plan(plan_file)
        else:
            made = normsearch.plan(model, read_to(to or []), inputs=inputs)
        # A copy only where there is something to compare with: checkpoints may be large.
        converted = normsearch.convert(model, made, inputs=inputs, keep=keep.value, in_place=not compared)
    if not compared:
        return _Result(converted, made, None)
    with progress("comparing"):
        return _Result(converted, made, normsearch.compare(model, converted, [inputs], logits=logits))


def _write(
    result: _Result,
    architecture: Architecture,
    output: Path,
    report: Path | None,
    *,
    script: bool,
    force: bool,
) -> list[Path]:
    # The script first: what it cannot show is no reason to lose the checkpoint.
    texts: dict[Path, str] = {}
    if script:
        try:
            texts = {
                output.with_name(name): text
                for name, text in scripts(result.model, architecture, result.plan, output.name).items()
            }
        except NormsearchError as error:
            typer.echo(f"note: no {SCRIPT}: {error}", err=True)
    if report is not None and result.report is not None:
        texts[report] = result.report.to_json()
    save(result.model, output, architecture=architecture, plan=result.plan, force=force)
    for path, text in texts.items():
        write_text(path, text, force=force)
    return [output, *texts]
