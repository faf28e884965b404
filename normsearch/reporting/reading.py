"""What a report's JSON holds, validated by pydantic: the text may come from anywhere."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from normsearch.errors import ReportError
from normsearch.reporting.sections import SECTIONS, Section
from normsearch.reports import Environment

_WAY_OUT = "give what Document.to_json() wrote"


def read(text: str | bytes, form: str, version: int) -> dict[str, Any]:
    """Return a document's fields.

    Args:
        text: the JSON.
        form: what its ``format`` must say.
        version: the ``version`` that is known.

    Raises:
        ReportError: not JSON, no report, of another version, or a field is missing or of another type.

    """
    try:
        given = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ReportError(f"not a report: {error}; {_WAY_OUT}") from error
    if not isinstance(given, dict) or given.get("format") != form:
        raise ReportError(f"not a report: its format is not {form!r}; {_WAY_OUT}")
    if given.get("version") != version:
        raise ReportError(
            f"a report of version {given.get('version')!r:.20}; this normsearch reads version {version}: "
            "update normsearch, or write the report again"
        )
    sections = given.get("sections")
    if not isinstance(sections, list):
        raise ReportError(f"not a report: it has no list of sections; {_WAY_OUT}")
    fields = {name: _validated(str, name, given.get(name)) for name in ("title", "normsearch", "created")}
    return fields | {
        "environment": _validated(Environment, "environment", given.get("environment")),
        "sections": tuple(_section(number, section) for number, section in enumerate(sections)),
    }


def _section(number: int, given: Any) -> Section:
    kind = given.get("kind") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in SECTIONS:
        raise ReportError(
            f"not a report: section {number} is of the unknown kind {kind!r:.40}; there are "
            f"{', '.join(SECTIONS)}"
        )
    section: Section = _validated(SECTIONS[kind], f"section {number} ({kind})", given)
    return section


def _validated(kind: type, where: str, value: Any) -> Any:
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in (where, *first["loc"]))
        raise ReportError(f"not a report: {path}: {first['msg']}; {_WAY_OUT}") from error


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
