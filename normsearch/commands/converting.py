"""The command that converts a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch.export import ExportedProgram

import normsearch
from normsearch.architectures import Architecture
from normsearch.arguments import read_plan, read_to
from normsearch.checkpoints import Checkpoint, save
from normsearch.commands import onnx_files
from normsearch.commands.options import (
    MEASURED,
    Arch,
    Arguments,
    Batch,
    Entry,
    File,
    Force,
    ImageSize,
    Inputs,
    Json,
    Keep,
    Logits,
    Mean,
    Methods,
    Shape,
    Std,
)
from normsearch.commands.running import (
    OUT,
    fail,
    first_of,
    given_inputs,
    loaded_from,
    print_json,
    progress,
    refuse_outputs,
    reported,
    show,
)
from normsearch.commands.wording import in_options
from normsearch.errors import NormsearchError
from normsearch.files import write_text
from normsearch.inputs import Batches
from normsearch.opening import Model
from normsearch.plans import Plan
from normsearch.rebuilding import script_names, scripts
from normsearch.text import visible


@reported
def convert(
    checkpoint: File,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The converted checkpoint, .safetensors; .pt2 of a .pt2, .onnx of ONNX."
        ),
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
    batch_size: Batch = MEASURED,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what changed as JSON; needs --inputs or --input-shape.")
    ] = None,
    logits: Logits = False,
    script: Annotated[
        bool, typer.Option(help="Write NAME_model.py, which rebuilds the network without normsearch.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace the BatchNorm layers of a checkpoint and write the converted one.

    normsearch convert resnet50.pth --architecture torchvision/resnet50 --to group -o out.safetensors

    normsearch convert model.onnx --to group -o out.onnx
    """
    if bool(to) == (plan_file is not None):
        raise typer.BadParameter("give either --to or --plan", param_hint="--to")
    if output is None and not dry_run:
        raise typer.BadParameter("say where to write, for example -o out.safetensors", param_hint="--output")
    if report is not None and input_shape is None and inputs is None:
        raise typer.BadParameter("a report needs --input-shape or --inputs", param_hint="--report")
    if logits and report is None:
        raise typer.BadParameter("it is part of a report; give --report too", param_hint="--logits")
    if output is not None and not dry_run:
        # Before the work, not after it.
        scripted = script and not onnx_files.is_onnx(checkpoint)
        beside = [output.with_name(name) for name in script_names(output.name)] if scripted else []
        refuse_outputs([output, report, *beside], [checkpoint, plan_file, inputs], force=force)
    if onnx_files.is_onnx(checkpoint):
        onnx_files.refuse_options(architecture=architecture, arguments=arguments, entry=entry)
        return onnx_files.convert(
            checkpoint,
            None if dry_run else output,
            to,
            plan_file,
            keep,
            input_shape,
            inputs,
            batch_size,
            (image_size, mean, std),
            report,
            logits=logits,
            force=force,
            as_json=as_json,
        )
    loaded = loaded_from(checkpoint, architecture, arguments, entry)
    if loaded.plan is not None and loaded.plan.changes:
        fail(f"{checkpoint} is converted already; convert the checkpoint that it was made from")
    given = given_inputs(loaded.model, input_shape, batch_size, inputs, (image_size, mean, std))
    result = _convert(loaded, to, plan_file, keep, given, report is not None, logits)
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
    show(result.plan.__rich__())
    if result.report is not None:
        OUT.print(result.report)
    typer.echo("nothing written (--dry-run)" if dry_run else f"wrote {', '.join(map(str, written))}")
    return None


@dataclass(frozen=True)
class _Result:
    model: Model
    plan: Plan
    report: normsearch.Report | None


def _convert(
    loaded: Checkpoint,
    to: list[str] | None,
    plan_file: Path | None,
    keep: Keep,
    given: Batches | None,
    compared: bool,
    logits: bool,
) -> _Result:
    model, inputs = loaded.model, first_of(given)
    with progress("converting"):
        if plan_file is not None:
            made = read_plan(plan_file)
        else:
            made = normsearch.plan(model, read_to(to or []), inputs=inputs)
        # A copy only where there is something to compare with: checkpoints may be large.
        in_place = not compared and not isinstance(model, ExportedProgram)
        converted = normsearch.convert(model, made, inputs=inputs, keep=keep.value, in_place=in_place)
    if not compared or given is None:
        return _Result(converted, made, None)
    with progress("comparing"):
        return _Result(converted, made, normsearch.compare(model, converted, given, logits=logits))


def _write(
    result: _Result,
    architecture: Architecture | None,
    output: Path,
    report: Path | None,
    *,
    script: bool,
    force: bool,
) -> list[Path]:
    texts = script_texts(result.model, architecture, result.plan, output) if script else {}
    if report is not None and result.report is not None:
        texts[report] = result.report.to_json()
    save(result.model, output, architecture=architecture, plan=result.plan, force=force)
    for path, text in texts.items():
        write_text(path, text, force=force)
    return [output, *texts]


def script_texts(
    model: Model, architecture: Architecture | None, plan: Plan | None, output: Path
) -> dict[Path, str]:
    """Return the script that rebuilds a network beside its checkpoint, and its layers, by path.

    What it cannot show is no reason to lose the checkpoint: then there is a note and no script.
    """
    names = script_names(output.name)
    if architecture is None or isinstance(model, ExportedProgram):
        # A program is complete by itself.
        return {}
    try:
        made = scripts(model, architecture, plan, output.name, names)
    except NormsearchError as error:
        typer.echo(f"note: no {names[0]}: {visible(in_options(str(error)))}", err=True)
        return {}
    return {output.with_name(name): text for name, text in made.items()}
