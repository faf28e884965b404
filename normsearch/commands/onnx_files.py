"""The commands on ONNX files: no architecture and no code, the file says what its network is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import typer

import normsearch
from normsearch.arguments import read_plan, read_to
from normsearch.commands.options import Keep
from normsearch.commands.running import (
    OUT,
    fail,
    first_of,
    following,
    given_inputs,
    print_json,
    progress,
    show,
)
from normsearch.errors import CheckpointError
from normsearch.files import write_text
from normsearch.inputs import Batches
from normsearch.text import STEPS, percent

if TYPE_CHECKING:
    import onnx_ir as ir

    from normsearch.reporting import Document

SUFFIX = ".onnx"

#: ``--image-size``, ``--mean`` and ``--std``.
Images = tuple[int | None, str | None, str | None]


def is_onnx(*paths: Path | None) -> bool:
    """Tell whether a command was given ONNX files.

    Raises:
        CheckpointError: some are, some are not.

    """
    given = [path for path in paths if path is not None]
    found = [path for path in given if path.suffix.lower() == SUFFIX]
    if found and len(found) < len(given):
        raise CheckpointError(f"{found[0]} is an ONNX file; give ONNX files only, or none")
    return bool(found)


def refuse_options(**options: Any) -> None:
    """Raise a usage error for options that mean nothing for an ONNX file."""
    for name, value in options.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            instead = "; normsearch report --calibrated writes it" if name == "report" else ""
            raise typer.BadParameter(f"an ONNX file takes no such option{instead}", param_hint=option)


def library() -> ModuleType:
    """Return normsearch's functions for ONNX files.

    Raises:
        CheckpointError: what they need is not installed.

    """
    try:
        from normsearch import onnx_graph
    except ModuleNotFoundError as error:
        raise CheckpointError(f"ONNX files need {error.name}: pip install 'normsearch[onnx]'") from error
    return onnx_graph


def load(path: Path) -> ir.Model:
    """Read a file, and say that it is being read."""
    with progress(f"loading {path}"):
        model: ir.Model = library().load(path)
    return model


def inputs_for(
    model: ir.Model,
    shape: str | None,
    batch_size: int,
    inputs: Path | None,
    images: Images,
    samples: int | None = None,
    *,
    held_apart: bool = False,
) -> Batches | None:
    """Return the inputs that the options ask for, of the type of the model's own."""
    from normsearch.onnx_graph import running

    return given_inputs(
        running.stand_in(model),
        shape,
        batch_size,
        inputs,
        images,
        samples,
        held_apart=held_apart,
        only=running.batch_size(model),
    )


def sites(model: ir.Model, inputs: Batches | None) -> tuple[normsearch.NormSite, ...]:
    """Return the places where a model normalizes."""
    found: tuple[normsearch.NormSite, ...] = library().find_sites(model, first_of(inputs))
    return found


def explain(model: ir.Model, to: Sequence[str], inputs: Batches | None) -> normsearch.Explanation:
    """Return what a plan would decide."""
    found: normsearch.Explanation = library().explain(model, read_to(to), inputs=first_of(inputs))
    return found


def convert(
    path: Path,
    output: Path | None,
    to: list[str] | None,
    plan_file: Path | None,
    keep: Keep,
    shape: str | None,
    inputs: Path | None,
    batch_size: int,
    images: Images,
    report: Path | None,
    *,
    logits: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert a file and write what came of it; without ``output``, do all but write."""
    _check_suffix(output)
    model = load(path)
    given = inputs_for(model, shape, batch_size, inputs, images)
    with progress("converting"):
        if plan_file is not None:
            made = read_plan(plan_file)
        else:
            made = library().plan(model, read_to(to or []), inputs=first_of(given))
        converted = library().convert(model, made, inputs=first_of(given), keep=keep.value)
    measured = None
    if report is not None and given is not None:
        with progress("comparing"):
            measured = library().compare(model, converted, given, logits=logits)
    written = []
    if output is not None:
        with progress(f"writing {output}"):
            library().save(converted, output, force=force)
            if report is not None and measured is not None:
                write_text(report, measured.to_json(), force=force)
        written = [output, *([] if report is None else [report])]
    if as_json:
        print_json(
            {
                "written": [str(one) for one in written],
                "notes": [],
                "plan": json.loads(made.to_json()),
                "report": None if measured is None else json.loads(measured.to_json()),
            }
        )
        return
    show(made.__rich__())
    if measured is not None:
        OUT.print(measured)
    typer.echo(f"wrote {', '.join(map(str, written))}" if written else "nothing written (--dry-run)")


def compare(
    before: Path,
    after: Path,
    shape: str | None,
    inputs: Path | None,
    batch_size: int,
    images: Images,
    *,
    logits: bool,
) -> normsearch.Report:
    """Measure how two files differ."""
    first, second = load(before), load(after)
    given = inputs_for(first, shape, batch_size, inputs, images)
    with progress("comparing"):
        report: normsearch.Report = library().compare(first, second, given, logits=logits)
    return report


def calibrate(
    original: Path,
    converted: Path,
    inputs: Path,
    output: Path,
    batch_size: int,
    samples: int,
    images: Images,
    seed: int,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Calibrate a converted file by least squares and write it."""
    _check_suffix(output)
    before, after = load(original), load(converted)
    given = inputs_for(before, None, batch_size, inputs, images, samples, held_apart=True)
    assert given is not None
    with progress("reading inputs"):
        batches = given.kept()
    with following() as follow:
        calibrated = library().calibrate(after, before, batches, seed=seed, on_progress=follow)
    record = library().calibration_record(calibrated)
    with progress(f"writing {output}"):
        library().save(calibrated, output, force=force)
    if as_json:
        print_json({"written": [str(output)], "notes": given.notes, "calibration": asdict(record)})
        return
    for rung in record.rungs:
        kept = "kept" if rung.kept else "undone"
        name = STEPS.get(rung.name, rung.name)
        typer.echo(f"{name}: held-out error {percent(rung.error)}, {kept}, {rung.seconds:.1f} s")
    typer.echo(f"held-out error {percent(record.error.before)} before, {percent(record.error.after)} after")
    typer.echo(f"wrote {output}")


def report(
    paths: tuple[Path, Path, Path | None],
    plan_file: Path,
    shape: str | None,
    inputs: Path | None,
    batch_size: int,
    images: Images,
    samples: int,
    *,
    notes: Sequence[str],
    **options: Any,
) -> Document:
    """Measure the conversion of a file.

    Args:
        paths: the model before, after conversion, and after calibration.
        plan_file: the plan that converted it.
        shape: ``--input-shape``.
        inputs: ``--inputs``.
        batch_size: ``--batch-size``.
        images: ``--image-size``, ``--mean`` and ``--std``.
        samples: the most samples.
        notes: what else readers should know.
        options: for ``document``.

    """
    plan = read_plan(plan_file)
    before, after, *calibrated = [load(path) for path in paths if path is not None]
    given = inputs_for(before, shape, batch_size, inputs, images, samples)
    notes = (*notes, *(() if given is None else given.notes))
    last = calibrated[0] if calibrated else None
    with following() as follow:
        found: Document = library().document(
            before, after, plan, given, calibrated=last, notes=notes, on_progress=follow, **options
        )
    return found


def _check_suffix(output: Path | None) -> None:
    if output is not None and output.suffix != SUFFIX:
        fail(f"{output}: ONNX models are written as {SUFFIX}; give such a name")
