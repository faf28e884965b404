"""Where a search's results are written, and in which words they are told."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normsearch.checkpoints import save
from normsearch.commands.running import refuse_outputs
from normsearch.errors import CheckpointError
from normsearch.files import write_text
from normsearch.plans import Plan
from normsearch.reporting.parts import finite
from normsearch.text import visible

# Optuna takes half a second to import.
if TYPE_CHECKING:
    from normsearch.reporting import Document
    from normsearch.searching import SearchResult
    from normsearch.searching.confirming import Confirmed


def folder_or_weights(output: Path) -> Path:
    """Return ``--output``.

    Raises:
        CheckpointError: it has the suffix of a file that is not written.

    """
    if output.suffix not in ("", ".safetensors") and not output.exists():
        raise CheckpointError(
            f"-o {output}: weights are written as NAME.safetensors; give that, or a folder, which must exist "
            f"already if its name ends like a file's ({output.suffix})"
        )
    return output


def places_of(output: Path) -> tuple[Path, Path, Path, Path]:
    """Return where the weights, the plan and the report's HTML and JSON are written.

    Raises:
        CheckpointError: the file has another suffix.

    """
    if output.suffix == ".safetensors" and not output.is_dir():
        beside = [output.with_name(f"{output.stem}_{rest}") for rest in ("plan.json", "report.html")]
        return output, beside[0], beside[1], beside[1].with_suffix(".json")
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is no folder; give one, or NAME.safetensors")
    names = ("model.safetensors", "plan.json", "report.html", "report.json")
    first, second, third, fourth = (output / name for name in names)
    return first, second, third, fourth


def refuse_places(places: tuple[Path, ...], journal: Path | None, *, force: bool) -> None:
    """Raise before any work where the results cannot be written."""
    folder = places[0].parent
    if folder.exists():
        refuse_outputs(places, [journal], force=force)
    elif not folder.parent.is_dir():
        raise CheckpointError(f"{folder}: the folder {str(folder.parent)!r} does not exist; make it first")
    try:
        if folder.exists():
            with tempfile.TemporaryFile(dir=folder):
                pass
        else:
            folder.mkdir()
            folder.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"nothing can be written into {folder} ({error.strerror or error}); give another -o"
        ) from error


def write_found(
    found: SearchResult, report: Document, places: tuple[Path, Path, Path, Path], *, force: bool
) -> None:
    """Write the trained network, its plan and the report."""
    weights, plan, page, _ = places
    weights.parent.mkdir(exist_ok=True)
    save(found.model, weights, plan=found.best, force=force)
    write_text(plan, found.best.to_json(), force=force)
    report.save(page, force=force)


def rows_of(confirmation: Iterable[Confirmed]) -> list[dict[str, Any]]:
    """Return a confirmation as JSON holds it: the error of a single seed is not known."""
    return [{**asdict(row), "error": finite(row.error)} for row in confirmation]


def told_plan(best: Plan, further: Mapping[str, Any]) -> str:
    """Return a plan in a line: what it changes, and what else its trial was told to try."""
    counts: dict[str, int] = {}
    for method in best.values():
        counts[str(method)] = counts.get(str(method), 0) + 1
    told = "the plan: " + ", ".join(f"{method} at {count}" for method, count in counts.items())
    return told + "".join(f"; {name}={visible(repr(value))}" for name, value in further.items())
