"""What a child is given: a network's file, plans as they were typed, words for a client."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from api.engine.networks import Network, read
from api.messages import Progressed
from api.tasks import Inspected, Site, Source
from normsearch.architectures import Architecture
from normsearch.arguments import read_to
from normsearch.commands.wording import in_options
from normsearch.errors import ArchitectureError, CheckpointError
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Progress
from normsearch.sites import NormSite

#: So many of a network's inputs are told of.
_MOST_INPUTS = 1000
#: Told how far the work has come.
Report = Callable[[Progressed], None]


def said(message: str, folder: Path) -> str:
    """Return a message in the words of the service: its fields for options, a file's name for its path."""
    options = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda match: match[1].replace("-", "_"), in_options(message))
    return options.replace(f"{folder}/", "")[:20_000]


def following(report: Report) -> OnProgress:
    """Return a callback for the library that tells the service."""

    def follow(step: Progress) -> None:
        report(
            Progressed(
                stage=step.stage[:200],
                done=step.done,
                total=step.total,
                seconds_left=step.seconds_left,
                detail=step.detail[:2000],
            )
        )

    return follow


def loaded(source: Source, folder: Path) -> Network:
    """Return the network in a file, of whichever kind its name says."""
    architecture = None
    if source.architecture is not None:
        architecture = Architecture(source.architecture, source.arguments)
        if architecture.is_factory and not source.configured:
            raise ArchitectureError(
                f"{source.architecture} is code, which only the operator may name; "
                "GET /v1/architectures lists what there is"
            )
    elif source.arguments:
        raise ArchitectureError("arguments belong to an architecture; give both")
    return read(folder / source.file, architecture, source.entry, configured=source.configured)


def original(source: Source, folder: Path) -> Network:
    """Return a network that was not converted yet.

    Raises:
        CheckpointError: it was.

    """
    found = loaded(source, folder)
    if found.plan is not None and found.plan.changes:
        raise CheckpointError(f"{source.file} is converted already; give the file that it was made from")
    return found


def converted(
    file: str, plan: str | None, before: Network, source: Source, folder: Path
) -> tuple[Any, Plan | None]:
    """Return what the service made of a network, and the plan; None where neither file says it.

    Raises:
        CheckpointError: a file that says its plan does not.

    """
    given = None if plan is None else folder / plan
    model, found = before.made(folder / file, given, configured=source.configured)
    if found is None and before.kind != "onnx":
        raise CheckpointError(f"{file} does not say how it was converted; give weights that were made here")
    return model, found


def title(source: Source, found: Network) -> str:
    """Return what a report is about, in the client's words: factories are known by the operator's names."""
    if found.architecture is None:
        return source.file
    return str(found.architecture) if source.known_as is None or not source.configured else source.known_as


def inspected(found: Network) -> Inspected:
    """Return what is known of a network."""
    architecture = found.architecture
    return Inspected.model_validate(
        {
            "format": found.kind,
            "architecture": None if architecture is None else architecture.name,
            "arguments": {} if architecture is None else architecture.arguments,
            "parameters": found.parameters,
            "converted": found.plan is not None and bool(found.plan.changes),
            "notes": found.notes,
            "inputs": None if found.inputs is None else found.inputs[:_MOST_INPUTS],
            "sites": [told(site) for site in found.library.find_sites(found.model)],
        }
    )


def told(site: NormSite) -> Site:
    """Return a site as data.

    Raises:
        CheckpointError: its numbers are none.

    """
    for name, value in (("eps", site.eps), ("momentum", site.momentum or 0.0)):
        if not math.isfinite(value):
            raise CheckpointError(f"{site.path} has {name} {value}, which is no number; export it again")
    return Site.model_validate(asdict(site))


def wanted(given: Any) -> Any:
    """Read texts as the command line does; a mapping is what the library takes."""
    return given if isinstance(given, dict) else read_to([given] if isinstance(given, str) else given)
