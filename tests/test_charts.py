"""Charts of a report: values where they belong."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normsearch.reporting import charts


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def test_depth_chart_puts_values_where_they_belong() -> None:
    points = [charts.Point(f"a.{n}", (n / 4, None if n == 1 else 0.1)) for n in range(5)]
    svg = parse(charts.depth_chart(points, ["before", "after"], width=1040, label="drift"))
    dots = [c for c in svg.iter("circle") if c.get("class") == "dot s0"]
    x, y = ([float(dot.get(name, "")) for dot in dots] for name in ("cx", "cy"))
    steps = [b - a for a, b in pairwise(x)]
    assert steps == pytest.approx([steps[0]] * 4, abs=1e-2)
    rises = [a - b for a, b in pairwise(y)]
    assert rises == pytest.approx([rises[0]] * 4, abs=1e-2)
    # Linear from 0: the first value stands on the axis.
    grid = [float(line.get("y1", "")) for line in svg.iter("line")]
    assert y[0] == pytest.approx(max(grid))
    assert y[4] == pytest.approx(min(grid))
    assert len([c for c in svg.iter("circle") if c.get("class") == "dot s1"]) == 4
    assert [dot[0].text for dot in dots][1] == "a.1: 25.0 % before"
    said = svg.find("desc")
    assert said is not None
    assert "before: 0 % at the first site, 100 % at the last, at most 100 % at a.4" in (said.text or "")


def test_depth_chart_is_logarithmic_where_one_site_hides_the_others() -> None:
    points = [charts.Point("a", (value,)) for value in (0.01, 0.01, 0.1, 0.01, 100.0)]
    svg = parse(charts.depth_chart(points, ["before"], width=400, label="drift"))
    y = [float(dot.get("cy", "")) for dot in svg.iter("circle")]
    assert (y[0] - y[4]) / (y[0] - y[2]) == pytest.approx(4, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6) | st.none(), min_size=1, max_size=30))
def test_depth_chart_never_leaves_its_frame(values: list[float | None]) -> None:
    points = [charts.Point(f"block{n % 3}.{n}", (value,)) for n, value in enumerate(values)]
    svg = parse(charts.depth_chart(points, ["before"], width=358, label="drift"))
    for dot in svg.iter("circle"):
        assert 0 <= float(dot.get("cx", "")) <= 358
        assert 29 <= float(dot.get("cy", "")) <= 267


def test_bars_and_histograms_add_up() -> None:
    svg = parse(charts.stacked_bar((0.2, 0.3, 0.5), ("a", "b", "c"), "label"))
    widths = [float(rect.get("width", "")) for rect in svg.iter("rect")]
    assert widths == pytest.approx([36, 54, 90])
    svg = parse(charts.histogram((4, 0, 1), "label"))
    heights = [float(rect.get("height", "")) for rect in svg.iter("rect")]
    assert heights == pytest.approx([30, 0, 7.5])
