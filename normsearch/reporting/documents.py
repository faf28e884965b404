"""Document: a report as sections of plain data, which JSON holds and one HTML file shows."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from normsearch.errors import ReportError
from normsearch.files import refuse_existing, write_text
from normsearch.reporting.sections import Section
from normsearch.reports import Environment

FORMAT, VERSION = "normsearch report", 1

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A report; made by ``reporting.document``, read back by ``from_json``.

    ``Document.from_json(document.to_json()) == document``.

    Attributes:
        title: what it is about, for example the network's name.
        environment: device, dtype and versions that the numbers were measured with.
        normsearch: the version that wrote it.
        created: when, in UTC, as ISO 8601.
        sections: its parts, in the order in which they are shown.

    """

    title: str
    environment: Environment
    normsearch: str
    created: str
    sections: tuple[Section, ...]

    def section(self, kind: type[S]) -> S | None:
        """Return the section of a class, for example ``document.section(Layers)``; None without one."""
        return next((section for section in self.sections if isinstance(section, kind)), None)

    def to_json(self) -> str:
        """Return the report as JSON; what could not be measured is null."""
        return json.dumps(self._plain(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a report written by ``to_json``; the text may come from anywhere and is validated.

        Raises:
            ReportError: not JSON, no report, of a version that this one does not know, or malformed.

        """
        # pydantic takes a third of a second to import: only where something is read from outside.
        from normsearch.reporting.reading import read

        document = cls(**read(text, FORMAT, VERSION))
        if not _is_held(json.loads(text), json.loads(document.to_json())):
            raise ReportError("not a report: it holds fields that this version of normsearch does not know")
        return document

    def to_html(self) -> str:
        """Return the report as one HTML page that needs nothing else: no network, no script."""
        # jinja2 takes its time to import too.
        from normsearch.reporting.page import html

        return html(self)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> tuple[Path, Path]:
        """Write ``NAME.html`` and ``NAME.json`` beside each other; each appears complete or not at all.

        Args:
            path: either of the two, or their common name without a suffix.
            force: replace files that exist.

        Returns:
            The paths of the HTML and of the JSON file.

        Raises:
            CheckpointError: a file exists or cannot be written.

        """
        path = Path(path)
        check_name(path)
        html, written = path.with_suffix(".html"), path.with_suffix(".json")
        for target in (html, written):
            refuse_existing(target, force=force)
        for target, text in ((html, self.to_html()), (written, self.to_json())):
            write_text(target, text, force=force)
        return html, written

    def _plain(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def check_name(path: Path) -> None:
    """Raise unless a report may be written under a name.

    Raises:
        ReportError: it ends otherwise.

    """
    if path.suffix not in ("", ".html", ".json"):
        raise ReportError(f"{path}: a report is written as .html and .json; give such a name")


def _is_held(given: Any, read: Any) -> bool:
    """Tell whether everything given was read; what only was read is what older versions did not write."""
    if isinstance(given, dict) and isinstance(read, dict):
        return set(given) <= set(read) and all(_is_held(given.get(key), value) for key, value in read.items())
    if isinstance(given, list) and isinstance(read, list):
        return len(given) == len(read) and all(map(_is_held, given, read))
    return bool(given == read)
