"""Commands that only look: methods, architectures, sites, plan."""

from __future__ import annotations

from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

import normsearch
from normsearch.arguments import read_to
from normsearch.commands import onnx_files
from normsearch.commands.options import (
    Arch,
    Arguments,
    Batch,
    Entry,
    Force,
    ImageSize,
    Inputs,
    Json,
    MaybeFile,
    Mean,
    Methods,
    Shape,
    Std,
)
from normsearch.commands.running import (
    ERR,
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
from normsearch.errors import NormsearchError
from normsearch.files import write_text
from normsearch.methods import METHODS
from normsearch.methods.base import spelled
from normsearch.plans import planned
from normsearch.registries import LIBRARIES, names
from normsearch.tables import Column, Listing
from normsearch.text import visible


@reported
def methods(as_json: Json = False) -> None:
    """List the normalization methods."""
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "title": method.title,
            "exact": method().exact,
            "batch_independent": method().batch_independent,
            "options": {field.name: field.default for field in fields(method)},
            "citation": method.citation,
        }
        for name, method in METHODS.items()
    ]
    if as_json:
        return print_json(rows)
    columns = (
        Column("method"),
        Column("function"),
        Column("batch independent", optional=True),
        Column("options", prose=True),
        Column("source", prose=True, optional=True),
    )
    lines = [
        (
            name,
            "exact" if method().exact else "approximate",
            "yes" if method().batch_independent else "in eval",
            ", ".join(f"{field.name}={spelled(field.default)}" for field in fields(method)),
            f"{method.title}. {method.citation}",
        )
        for name, method in METHODS.items()
    ]
    return show(Listing(f"{len(rows)} methods", columns, lines))


@reported
def architectures(
    pattern: Annotated[str, typer.Argument(help="Only those that match, for example 'timm/resnet*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the architectures that are known by name, and the arguments each library's may take."""
    found = [
        f"{library}/{name}"
        for library in LIBRARIES
        for name in _available(library)
        if fnmatchcase(f"{library}/{name}", pattern)
    ]
    allowed = {
        library: {key: value.describe() for key, value in LIBRARIES[library].arguments.items()}
        for library in LIBRARIES
        if any(name.startswith(f"{library}/") for name in found)
    }
    if not found:
        fail(f"no architecture matches {pattern!r}; * matches any text, for example '*resnet*'")
    if as_json:
        return print_json({"architectures": found, "arguments": allowed})
    for name in found:
        typer.echo(name)
    columns = (Column("library"), Column("argument"), Column("value", prose=True))
    lines = [(library, key, text) for library, values in allowed.items() for key, text in values.items()]
    table = Listing("arguments", columns, lines)
    return ERR.print(table) if not OUT.is_terminal else OUT.print(table)


def _available(library: str) -> tuple[str, ...]:
    try:
        return names(library)
    except NormsearchError as error:
        typer.echo(f"note: {error}", err=True)
        return ()


@reported
def sites(
    checkpoint: MaybeFile = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 2,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
) -> None:
    """List the places where a network normalizes."""
    images = (image_size, mean, std)
    if checkpoint is not None and onnx_files.is_onnx(checkpoint):
        onnx_files.refuse_options(architecture=architecture, arguments=arguments, entry=entry)
        model = onnx_files.load(checkpoint)
        given = onnx_files.inputs_for(model, input_shape, batch_size, inputs, images)
        found = onnx_files.sites(model, given)
    else:
        loaded = loaded_from(checkpoint, architecture, arguments, entry)
        given = given_inputs(loaded.model, input_shape, batch_size, inputs, images)
        with progress("looking for BatchNorm"):
            found = normsearch.find_sites(loaded.model, first_of(given))
    if as_json:
        return print_json([asdict(site) for site in found])
    if not found:
        return typer.echo(f"{visible(str(checkpoint or architecture))} has no BatchNorm layer")
    columns = (
        Column("site"),
        Column("channels", number=True),
        Column("input", optional=True),
        Column("layer", optional=True),
        Column("producer", optional=True),
        Column("kind", optional=True),
        Column("eps", optional=True),
    )
    lines = [
        (
            site.path or "(model)",
            str(site.channels or "?"),
            " ".join("x".join(map(str, shape[1:])) for shape in site.input_shapes),
            site.layer.rpartition(".")[2],
            "" if site.producer is None else site.producer.path,
            site.kind,
            str(site.eps),
        )
        for site in found
    ]
    return show(Listing(f"{len(found)} sites", columns, lines))


@reported
def plan(
    checkpoint: MaybeFile = None,
    to: Methods = None,
    architecture: Arch = None,
    arguments: Arguments = None,
    entry: Entry = None,
    input_shape: Shape = None,
    inputs: Inputs = None,
    batch_size: Batch = 2,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Say which method would stand at each site, and why not; change nothing."""
    if not to:
        raise typer.BadParameter("give at least one method, for example --to group", param_hint="--to")
    if output is not None:
        refuse_outputs([output], [checkpoint, inputs], force=force)
    images = (image_size, mean, std)
    if checkpoint is not None and onnx_files.is_onnx(checkpoint):
        onnx_files.refuse_options(architecture=architecture, arguments=arguments, entry=entry)
        model = onnx_files.load(checkpoint)
        explanation = onnx_files.explain(
            model, to, onnx_files.inputs_for(model, input_shape, batch_size, inputs, images)
        )
    else:
        loaded = loaded_from(checkpoint, architecture, arguments, entry)
        given = first_of(given_inputs(loaded.model, input_shape, batch_size, inputs, images))
        with progress("planning"):
            explanation = normsearch.explain(loaded.model, read_to(to), inputs=given)
    if as_json:
        typer.echo(explanation.to_json())
    else:
        show(explanation.__rich__())
    made = planned(explanation)
    if output is not None:
        write_text(output, made.to_json(), force=force)
