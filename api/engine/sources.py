"""What a child is given: a checkpoint in its network, plans as they were typed, words for a client."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import normsearch
from api.messages import Progressed
from api.tasks import Inspected, Site, Source
from normsearch.admission import legacy, torch_zip
from normsearch.architectures import Architecture
from normsearch.arguments import read_to
from normsearch.checkpoints import Checkpoint, load
from normsearch.commands.wording import in_options
from normsearch.errors import ArchitectureError, CheckpointError
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Progress

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


def loaded(source: Source, folder: Path) -> Checkpoint:
    """Return a checkpoint in its network."""
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
    found = load(folder / source.file, architecture, entry=source.entry, allow_factories=source.configured)
    if found.architecture is None:
        raise CheckpointError(
            f"{source.file} is an exported program, which the command line converts: normsearch convert "
            f"{source.file} --to METHOD -o converted.pt2"
        )
    return found


def original(source: Source, folder: Path) -> Checkpoint:
    """Return a checkpoint that was not converted yet.

    Raises:
        CheckpointError: it was.

    """
    found = loaded(source, folder)
    if found.plan is not None and found.plan.changes:
        raise CheckpointError(
            f"{source.file} is converted already; give the checkpoint that it was made from"
        )
    return found


def converted(file: str, before: Checkpoint, source: Source, folder: Path) -> tuple[Any, Plan]:
    """Return what the service made of a checkpoint, and the plan.

    Raises:
        CheckpointError: it does not say how it was converted.

    """
    found = load(folder / file, before.architecture, allow_factories=source.configured)
    if found.plan is None:
        raise CheckpointError(f"{file} does not say how it was converted; give weights that were made here")
    return found.model, found.plan


def title(source: Source, found: Checkpoint) -> str:
    """Return what a report is about, in the client's words: factories are known by the operator's names."""
    return str(found.architecture) if source.known_as is None or not source.configured else source.known_as


def inspected(found: Checkpoint, source: Source, folder: Path) -> Inspected:
    """Return what is known of a checkpoint."""
    head = (folder / source.file).open("rb").read(64)
    kinds = ((torch_zip.MAGIC, "torch zip"), (legacy.MAGIC, "torch legacy"))
    sites = [asdict(site) for site in normsearch.find_sites(found.model)]
    assert found.architecture is not None
    return Inspected.model_validate(
        {
            "format": next((kind for magic, kind in kinds if head.startswith(magic)), "safetensors"),
            "architecture": found.architecture.name,
            "arguments": found.architecture.arguments,
            "parameters": sum(parameter.numel() for parameter in found.model.parameters()),
            "converted": found.plan is not None and bool(found.plan.changes),
            "notes": found.notes,
            "sites": [Site.model_validate(site) for site in sites],
        }
    )


def wanted(given: Any) -> Any:
    """Read texts as the command line does; a mapping is what the library takes."""
    return given if isinstance(given, dict) else read_to([given] if isinstance(given, str) else given)
