"""What normsearch reads back from JSON, validated by pydantic: the text may come from anywhere."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from normsearch.activations import Activation
from normsearch.dataflow import Producer
from normsearch.errors import PlanError
from normsearch.sites import NormSite

_CONFIG = ConfigDict(extra="forbid", strict=False)


@dataclass(config=_CONFIG)
class _Row:
    site: dict[str, Any]
    method: str
    notes: tuple[str, ...] = ()


@dataclass(config=_CONFIG)
class _Plan:
    rows: tuple[_Row, ...]
    notes: tuple[str, ...] = ()


_PLAN = TypeAdapter(_Plan)
_SITE = TypeAdapter(NormSite, config=None)


def read_plan(text: str | bytes) -> tuple[list[tuple[NormSite, str, tuple[str, ...]]], tuple[str, ...]]:
    """Return (site, method's spelling, notes) for each row, and the notes of the whole.

    Raises:
        PlanError: not JSON, a field is missing, unknown or of another type, or a path occurs twice.

    """
    try:
        document = _PLAN.validate_json(text)
        rows = [(_SITE.validate_python(_known(row.site)), row.method, row.notes) for row in document.rows]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise PlanError(f"not a plan: {where}: {first['msg']}; give what Plan.to_json() wrote") from error
    paths = [site.path for site, _, _ in rows]
    for site in (site for site, _, _ in rows):
        if not (math.isfinite(site.eps) and site.eps >= 0):
            raise PlanError(f"not a plan: eps {site.eps} at {site.path!r}; it is a finite number, at least 0")
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise PlanError(f"not a plan: {', '.join(sorted(twice))} occurs twice; each site has one row")
    return rows, document.notes


def _known(site: dict[str, Any]) -> dict[str, Any]:
    for given, known in (
        (site, NormSite),
        (site.get("producer") or {}, Producer),
        (site.get("followed_by") or {}, Activation),
    ):
        # Anything else than an object is left to the validation.
        unknown = sorted(set(given if isinstance(given, dict) else ()) - set(known.__dataclass_fields__))
        if unknown:
            raise PlanError(f"not a plan: a site has the unknown field {unknown[0]!r}")
    return site
