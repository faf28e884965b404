"""Commands that show where a conversion goes astray: sensitivity, report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import normsearch
from normsearch.arguments import read_methods, read_text
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
    Logits,
    Mean,
    Samples,
    Shape,
    Std,
    Threshold,
    Title,
)
from normsearch.commands.running import (
    OUT,
    converted_from,
    fail,
    following,
    given_inputs,
    loaded_from,
    name_of,
    needs_inputs,
    refuse_outputs,
    reported,
)
from normsearch.commands.wording import in_options
from normsearch.files import write_text
from normsearch.methods import METHODS
from normsearch.reporting import Document, document
from normsearch.reporting.documents import check_name
from normsearch.sensitivities import THRESHOLD, Sensitivity, check_threshold
from normsearch.text import visible

_NOISE = "inputs are random numbers: drifts on real inputs are others"


@reported
def sensitivity(
    checkpoint: File,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            "-t",
            help="Methods to try at every site, with commas; repeat. [default: all there are]",
            show_default=False,
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--site", help="Only sites whose path matches this pattern; repeat.", show_default=False
        ),
    ] = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 16,
    samples: Samples = 64,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    threshold: Threshold = THRESHOLD,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it as JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure how far the output moves when a single site gets another method.

    normsearch sensitivity resnet50.pth --architecture torchvision/resnet50 --to group,instance
    --inputs images/ -o sensitivity.json
    """
    needs_inputs(input_shape, inputs)
    check_threshold(threshold)
    if output is not None:
        refuse_outputs([output], [checkpoint, inputs], force=force)
    tried = read_methods(to) if to else [name for name in METHODS if name != "batch"]
    images = (image_size, mean, std)
    model: Any
    if onnx_files.is_onnx(checkpoint):
        onnx_files.refuse_options(architecture=architecture, arguments=arguments, entry=entry)
        model, library = onnx_files.load(checkpoint), onnx_files.library()
        given = onnx_files.inputs_for(model, input_shape, batch_size, inputs, images, samples)
    else:
        model, library = loaded_from(checkpoint, architecture, arguments, entry).model, normsearch
        given = given_inputs(model, input_shape, batch_size, inputs, images, samples)
    assert given is not None
    if inputs is None:
        typer.echo(f"note: {_NOISE}", err=True)
    with following() as follow:
        found: Sensitivity = library.sensitivity(model, tried, given, sites=sites, on_progress=follow)
    vetoes = found.vetoes(threshold)
    if output is not None:
        write_text(output, found.to_json(), force=force)
    if as_json:
        typer.echo(found.to_json())
        return
    OUT.print(found)
    for line in _refused(found):
        typer.echo(visible(line))
    if vetoes:
        pairs = sum(map(len, vetoes.values()))
        what = "veto" if pairs == 1 else "vetoes"
        typer.echo(
            f"{pairs} {what} at {len(vetoes)} of {len(found.sites)} sites: refused, or above {threshold:g}"
        )
    else:
        typer.echo(f"no veto: no method is refused anywhere or moves the output by more than {threshold:g}")
    if output is not None:
        typer.echo(f"wrote {output}")


def _refused(found: Sensitivity) -> Iterator[str]:
    """Yield why methods were refused, a line for each method and reason."""
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for refusal in found.refusals:
        where[refusal.method, refusal.reason].append(refusal.site or "(model)")
    for (method, reason), places in where.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        yield in_options(f"{places[0]}{more}: {method} refused: {reason}")


@reported
def report(
    original: Annotated[
        Path,
        typer.Argument(
            help="The checkpoint before conversion; or a report's JSON alone, to write its HTML.",
            show_default=False,
        ),
    ],
    converted: Annotated[
        Path | None, typer.Argument(help="The checkpoint after conversion.", show_default=False)
    ] = None,
    calibrated: Annotated[
        Path | None, typer.Option(help="The checkpoint after calibration.", show_default=False)
    ] = None,
    sensitivity_file: Annotated[
        Path | None,
        typer.Option("--sensitivity", help="What `normsearch sensitivity -o` wrote.", show_default=False),
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="The plan that converted an ONNX file, as `normsearch plan -o` writes it.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to: NAME.html, beside which NAME.json is written."),
    ] = None,
    title: Title = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = MEASURED,
    samples: Samples = 256,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    threshold: Threshold = THRESHOLD,
    logits: Logits = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Report what a conversion changed, as one HTML page and as JSON.

    normsearch report resnet50.pth converted.safetensors --architecture torchvision/resnet50
    --inputs images/ -o report.html

    normsearch report model.onnx out.onnx --plan plan.json --inputs inputs.npz -o report.html
    """
    if output is None and not as_json:
        raise typer.BadParameter("say where to write, for example -o report.html", param_hint="--output")
    if original.suffix == ".json":
        beside = {"plan": plan_file, "sensitivity": sensitivity_file, "calibrated": calibrated}
        for option, path in beside.items():
            if path is not None:
                raise typer.BadParameter("a report's JSON stands alone", param_hint=f"--{option}")
        _show_again(original, converted, output, force=force, as_json=as_json)
        return
    if converted is None:
        raise typer.BadParameter("give the converted checkpoint after the original", param_hint="CONVERTED")
    if onnx_files.is_onnx(original, converted, calibrated) != (plan_file is not None):
        raise typer.BadParameter(
            "the checkpoint says its plan itself; give one with ONNX files alone"
            if plan_file is not None
            else "an ONNX file does not say how it was converted; give what `normsearch plan -o` wrote",
            param_hint="--plan",
        )
    check_threshold(threshold)
    if output is not None:
        check_name(output)
        refuse_outputs(
            [output.with_suffix(".html"), output.with_suffix(".json")],
            [original, converted, calibrated, sensitivity_file, plan_file, inputs],
            force=force,
        )
    measured = None if sensitivity_file is None else Sensitivity.from_json(read_text(sensitivity_file))
    images, noise = (image_size, mean, std), (_NOISE,) if input_shape else ()
    if plan_file is not None:
        onnx_files.refuse_options(architecture=architecture, arguments=arguments, entry=entry)
        made = onnx_files.report(
            (original, converted, calibrated),
            plan_file,
            input_shape,
            inputs,
            batch_size,
            images,
            samples,
            sensitivity=measured,
            threshold=threshold,
            logits=logits,
            title=title or original.name,
            notes=noise,
        )
        _write(made, output, force=force, as_json=as_json)
        return
    before = loaded_from(original, architecture, arguments, entry)
    after, plan = converted_from(converted, before)
    last = None if calibrated is None else converted_from(calibrated, before)
    if last is not None and last[1] != plan:
        fail(
            f"{calibrated} has another plan than {converted}; give the calibrated form of the same conversion"
        )
    given = given_inputs(before.model, input_shape, batch_size, inputs, images, samples)
    with following() as follow:
        made = document(
            before.model,
            after,
            plan,
            given,
            calibrated=None if last is None else last[0],
            sensitivity=measured,
            threshold=threshold,
            logits=logits,
            title=title or name_of(before, original),
            notes=(*noise, *(() if given is None else given.notes)),
            on_progress=follow,
        )
    _write(made, output, force=force, as_json=as_json)


def _show_again(
    given: Path, converted: Path | None, output: Path | None, *, force: bool, as_json: bool
) -> None:
    """Write the HTML of a report whose JSON is there."""
    if converted is not None:
        raise typer.BadParameter("a report's JSON stands alone, without a checkpoint", param_hint="CONVERTED")
    made = Document.from_json(read_text(given))
    if output is not None:
        target = output.with_suffix(".html")
        refuse_outputs([target], [given], force=force)
        write_text(target, made.to_html(), force=force)
    if as_json:
        typer.echo(made.to_json())
    else:
        typer.echo(f"wrote {target}")


def _write(made: Document, output: Path | None, *, force: bool, as_json: bool) -> None:
    written = () if output is None else made.save(output, force=force)
    if as_json:
        typer.echo(made.to_json())
    else:
        typer.echo(f"wrote {', '.join(map(str, written))}")
