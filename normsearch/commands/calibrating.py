"""The command that calibrates a converted checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import normsearch
from normsearch.checkpoints import save
from normsearch.commands import onnx_files
from normsearch.commands.converting import script_texts
from normsearch.commands.options import (
    Arch,
    Arguments,
    Batch,
    Entry,
    Force,
    ImageSize,
    Json,
    Logits,
    Mean,
    NeededInputs,
    Original,
    Samples,
    Std,
    Title,
)
from normsearch.commands.running import (
    converted_from,
    following,
    given_inputs,
    loaded_from,
    name_of,
    print_json,
    progress,
    refuse_outputs,
    reported,
)
from normsearch.files import write_text
from normsearch.rebuilding import script_names
from normsearch.reporting import document
from normsearch.text import STEPS, percent


class Parameters(StrEnum):
    """Which parameters calibration may change."""

    ALL = "all"
    AFFINE = "affine"


@reported
def calibrate(
    original: Original,
    converted: Annotated[
        Path, typer.Argument(help="What `normsearch convert` made of it.", show_default=False)
    ],
    inputs: NeededInputs,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The calibrated checkpoint, .safetensors; .pt2 of .pt2, .onnx of ONNX.",
            show_default=False,
        ),
    ],
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    batch_size: Batch = 32,
    samples: Samples = 256,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    budget: Annotated[int, typer.Option(min=0, help="The most optimisation steps, one batch each.")] = 200,
    parameters: Annotated[
        Parameters, typer.Option(help="What may change: everything, or the new layers alone.")
    ] = Parameters.ALL,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write what changed: NAME.html, and NAME.json beside it; it measures both networks. Of ONNX "
            "files, `normsearch report --calibrated` writes it.",
            show_default=False,
        ),
    ] = None,
    title: Title = None,
    logits: Logits = False,
    script: Annotated[
        bool, typer.Option(help="Write NAME_model.py, which rebuilds the network without normsearch.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Bring a converted checkpoint back to its original with a few unlabelled inputs.

    normsearch calibrate resnet50.pth converted.safetensors --architecture torchvision/resnet50
    --inputs images/ -o calibrated.safetensors --report report.html

    ONNX files are calibrated by least squares alone, through onnxruntime.

    The inputs are read as they are: with differential privacy, they are not accounted for.
    """
    if report is None and (logits or title is not None):
        option = "--logits" if logits else "--title"
        raise typer.BadParameter("it is part of a report; give --report too", param_hint=option)
    reports = [] if report is None else [report.with_suffix(".html"), report.with_suffix(".json")]
    scripted = script and not onnx_files.is_onnx(original, converted)
    beside = [output.with_name(name) for name in script_names(output.name)] if scripted else []
    refuse_outputs([output, *beside, *reports], [original, converted, inputs], force=force)
    if onnx_files.is_onnx(original, converted):
        onnx_files.refuse_options(
            architecture=architecture, arguments=arguments, entry=entry, report=report is not None
        )
        return onnx_files.calibrate(
            original,
            converted,
            inputs,
            output,
            batch_size,
            samples,
            (image_size, mean, std),
            seed,
            force=force,
            as_json=as_json,
        )
    before = loaded_from(original, architecture, arguments, entry)
    model, plan = converted_from(converted, before)
    given = given_inputs(
        before.model, None, batch_size, inputs, (image_size, mean, std), samples, held_apart=True
    )
    assert given is not None
    with progress("reading inputs"):
        batches = given.kept()
    with following() as follow:
        calibrated = normsearch.calibrate(
            model,
            before.model,
            batches,
            budget=budget,
            parameters=parameters.value,
            seed=seed,
            on_progress=follow,
        )
        made = None
        if report is not None:
            made = document(
                before.model,
                model,
                plan,
                batches,
                calibrated=calibrated,
                logits=logits,
                title=title or name_of(before, original),
                notes=given.notes,
                on_progress=follow,
            )
    record = normsearch.calibration_record(calibrated)
    assert record is not None
    with progress(f"writing {output}"):
        texts = script_texts(calibrated, before.architecture, plan, output) if script else {}
        save(calibrated, output, architecture=before.architecture, plan=plan, force=force)
        for path, text in texts.items():
            write_text(path, text, force=force)
        if made is not None and report is not None:
            made.save(report, force=force)
    written = [output, *texts, *reports]
    if as_json:
        return print_json(
            {"written": [str(path) for path in written], "notes": before.notes, "calibration": asdict(record)}
        )
    for rung in record.rungs:
        kept = "kept" if rung.kept else "undone"
        name = STEPS.get(rung.name, rung.name)
        typer.echo(f"{name}: held-out error {percent(rung.error)}, {kept}, {rung.seconds:.1f} s")
    typer.echo(f"held-out error {percent(record.error.before)} before, {percent(record.error.after)} after")
    typer.echo(f"wrote {', '.join(map(str, written))}")
    return None
