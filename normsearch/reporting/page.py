"""html: a report as one page that needs nothing else; whatever it says is text, never markup."""

from __future__ import annotations

import base64
import hashlib
from bisect import bisect_right
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from normsearch.reporting import charts, sections
from normsearch.reporting.search_page import ORIGINS, SEARCH_FILTERS
from normsearch.text import STEPS, batches, percent, visible

if TYPE_CHECKING:
    from normsearch.reporting.documents import Document

#: Lower bounds of the heat map's colours but the first.
HEAT = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
_NAMES = {
    "metric": "Metric",
    "calibration": "Calibration",
    "layers": "Layers",
    "sensitivity": "Sensitivity",
    "gates": "Gates",
    "cost": "Cost",
    "dependence": "Dependence",
    "scores": "Plans",
    "chosen": "The plan",
    "trials": "History",
    "front": "Pareto front",
    "effects": "Effects",
    "importances": "Importances",
    "costs": "Costs",
    "notes": "Notes",
}
_MIXED = ("instance", "layer", "batch")
#: From this number of rows on a table scrolls in a frame of its own.
_MOST_ROWS = 40


def html(document: Document) -> str:
    """Return a report as HTML whose content security policy allows its own style sheet and nothing else."""
    style = _environment().get_template("page.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            document=document,
            # The style sheet is ours; the policy names it by its hash.
            style=Markup(style),
            policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
            "form-action 'none'",
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("normsearch.reporting"),
        autoescape=lambda name: name is None or not name.endswith(".css"),
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": unbroken,
        "batches": batches,
        "bar": charts.stacked_bar,
        "columns": charts.histogram,
        "heat": heat,
        "by_depth": by_depth,
        "depth": in_depth,
        "method_counts": method_counts,
        "breakable": breakable,
        "number": number,
        "path": path,
        "signed": signed,
        "steps": largest_steps,
    }
    environment.filters |= SEARCH_FILTERS
    environment.globals |= {
        "heat_bounds": HEAT,
        "mixed": _MIXED,
        "names": _NAMES,
        "calibration_steps": STEPS,
        "most_rows": _MOST_ROWS,
        "origin_names": ORIGINS,
    }
    return environment


def _finalize(value: Any) -> Any:
    """Show what a name would hide; jinja2 escapes it afterwards."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def heat(drift: float) -> int:
    """Return the colour of a drift, from 0."""
    return bisect_right(HEAT, drift)


def by_depth(layers: sections.Layers, width: int) -> Markup:
    """Draw the drift of every site that was reached, in the order of the forward pass."""
    rows = in_depth(layers)
    series = ["after conversion"]
    if any(row.calibrated is not None for row in rows):
        series.append("after calibration")
    points = [charts.Point(row.site, (row.converted, row.calibrated)[: len(series)]) for row in rows]
    return charts.depth_chart(points, series, width=width, label="Drift of each site's output by depth")


def in_depth(layers: sections.Layers) -> list[sections.LayerRow]:
    """Return the sites with a drift, in the order of the forward pass."""
    rows = [row for row in layers.rows if row.depth is not None and row.converted is not None]
    return sorted(rows, key=lambda row: row.depth or 0)


def largest_steps(layers: sections.Layers, count: int = 3) -> list[tuple[sections.LayerRow, float]]:
    """Return the changed sites whose drift most exceeds that of the site before, with the difference."""
    rows = in_depth(layers)
    before = [0.0, *(row.converted or 0.0 for row in rows)]
    steps = [
        (row, (row.converted or 0.0) - last) for row, last in zip(rows, before, strict=False) if row.changed
    ]
    return [(row, step) for row, step in sorted(steps, key=lambda pair: -pair[1])[:count] if step >= 0.01]


def method_counts(methods: dict[str, int]) -> list[tuple[str, int]]:
    """Return how many sites got each method, whatever its options; ``batch`` is what was there."""
    counts: Counter[str] = Counter()
    for spelling, count in methods.items():
        counts[spelling.partition("(")[0]] += count
    del counts["batch"]
    return counts.most_common()


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with thousands separated, or a dash."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}g}"


def unbroken(value: float | None) -> Markup:
    """Return a percentage that no line break parts from its sign."""
    return escape(percent(value)).replace(" ", Markup("&nbsp;"))


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+,.4g}" if value else "0"


def breakable(spelling: str) -> Markup:
    """Return a method's spelling that may be broken before its options."""
    return Markup("<wbr>(").join(visible(spelling).split("("))


def path(site: str) -> Markup:
    """Return a site's path that may be broken after its dots."""
    return Markup(".<wbr>").join(visible(site).split(".")) if site else Markup("(the model)")
