"""Charts as inline SVG, built as elements so that every text in them is escaped; colours come from the page.

Each function returns Markup. Classes, not colours, are written: the page's style sheet knows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from normsearch.text import percent, visible

#: From this number of sites on lines are thin and dots small.
_MANY = 120
#: Drifts up to this are drawn as 0 where there are no others.
_LEAST = 1e-12


@dataclass(frozen=True)
class Point:
    """One site of a chart over depth: its name and a value per series, None where there is none."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart, in the units of its view box."""

    width: int
    height: int = 300
    left: int = 58
    right: int = 14
    top: int = 30
    bottom: int = 34

    def x(self, share: float) -> float:
        """Return the place of a share of the area's width."""
        return self.left + share * (self.width - self.left - self.right)

    def y(self, share: float) -> float:
        """Return the place of a share of the area's height, from below."""
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def depth_chart(points: Sequence[Point], series: Sequence[str], *, width: int, label: str) -> Markup:
    """Draw one line per series over the sites in the order of the forward pass.

    Args:
        points: the sites.
        series: names of the values of a point.
        width: of the view box; text keeps its size, so a narrow chart is for narrow screens.
        label: what the chart shows, for those who hear it.

    """
    frame = Frame(width)
    scale, ticks = _axis([value for point in points for value in point.values if value is not None])
    root = figure(frame.width, frame.height, label, _description(points, series))
    if len(points) > _MANY:
        root.set("class", "many")
    _bands(root, frame, [point.name for point in points])
    for tick in ticks:
        y = frame.y(scale(tick))
        add(root, "line", "grid", x1=frame.left, x2=frame.width - frame.right, y1=y, y2=y)
        add(root, "text", "tick end", f"{100 * tick:,.6g} %", x=frame.left - 8, y=y + 4)
    add(
        root,
        "text",
        "tick middle",
        f"{len(points)} sites in the order of the forward pass",
        x=frame.x(0.5),
        y=frame.height - 10,
    )
    for number in range(len(series)):
        _line(root, frame, points, number, series[number], scale)
    return markup(root)


def _line(
    root: ElementTree.Element,
    frame: Frame,
    points: Sequence[Point],
    number: int,
    name: str,
    scale: Callable[[float], float],
) -> None:
    places = [
        (frame.x(_center(index, len(points))), frame.y(scale(value)), point, value)
        for index, point in enumerate(points)
        if (value := point.values[number]) is not None
    ]
    add(root, "polyline", f"line s{number}", points=" ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places))
    radius = 2 if len(points) > _MANY else 3.5
    for x, y, point, value in places:
        dot = add(root, "circle", f"dot s{number}", cx=x, cy=y, r=radius)
        ElementTree.SubElement(dot, "title").text = visible(f"{point.name}: {percent(value)} {name}")


def _bands(root: ElementTree.Element, frame: Frame, names: Sequence[str]) -> None:
    """Shade every other block of the network, and name those that are wide enough."""
    start = 0
    for number, (block, count) in enumerate(blocks(names)):
        left, right = frame.x(start / len(names)), frame.x((start + count) / len(names))
        start += count
        band = add(
            root,
            "rect",
            f"band{number % 2}",
            x=left,
            y=frame.top,
            width=right - left,
            height=frame.height - frame.top - frame.bottom,
        )
        ElementTree.SubElement(band, "title").text = visible(block)
        if len(visible(block)) * 7 < right - left:
            add(root, "text", "tick middle", block, x=(left + right) / 2, y=frame.top - 9)


def blocks(names: Sequence[str]) -> list[tuple[str, int]]:
    """Cut consecutive sites into blocks, by as few parts of their paths as tell blocks apart."""
    runs: list[tuple[str, int]] = []
    for parts in (1, 2, 3):
        runs = []
        for name in names:
            block = ".".join(name.split(".")[:parts])
            if runs and runs[-1][0] == block:
                runs[-1] = (block, runs[-1][1] + 1)
            else:
                runs.append((block, 1))
        if len(runs) >= min(3, len(names)):
            break
    return runs


def stacked_bar(shares: Sequence[float], names: Sequence[str], label: str) -> Markup:
    """Draw shares that add up to one as one bar."""
    root = figure(
        180, 16, label, ", ".join(f"{name} {percent(s)}" for name, s in zip(names, shares, strict=True))
    )
    left = 0.0
    for number, (share, name) in enumerate(zip(shares, names, strict=True)):
        part = add(root, "rect", f"part p{number}", x=left, y=0, width=180 * share, height=16)
        ElementTree.SubElement(part, "title").text = f"{name}: {percent(share)}"
        left += 180 * share
    return markup(root)


def histogram(counts: Sequence[int], label: str) -> Markup:
    """Draw counts in equal bins from 0 to 1 as columns."""
    total, most, width = sum(counts), max(counts, default=0) or 1, 180 / max(len(counts), 1)
    shown = [
        f"{index / len(counts):g} to {(index + 1) / len(counts):g}: {n}" for index, n in enumerate(counts)
    ]
    root = figure(180, 32, label, f"{total} channels; {'; '.join(shown)}")
    add(root, "line", "grid", x1=0, x2=180, y1=31.5, y2=31.5)
    for index, count in enumerate(counts):
        # A single channel among thousands stays visible.
        height = 0 if count == 0 else max(30 * count / most, 1.5)
        bar = add(root, "rect", "part p2", x=index * width + 1, y=31 - height, width=width - 2, height=height)
        ElementTree.SubElement(bar, "title").text = f"{shown[index]} of {total} channels"
    return markup(root)


def _center(index: int, count: int) -> float:
    return (index + 0.5) / count


def _axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """Return the scale of the y axis, from a value to a share of its height, and its ticks.

    Linear from 0; logarithmic where one site would hide all others.
    """
    positive = sorted(value for value in values if value > 0)
    most = positive[-1] if positive and positive[-1] > _LEAST else 1.0
    if positive and most > 1 and most > 20 * positive[len(positive) // 2]:
        low = math.floor(math.log10(max(positive[0], most * 1e-8)))
        high = math.ceil(math.log10(most))
        step = max(1, math.ceil((high - low) / 6))

        def logarithmic(value: float) -> float:
            return 0.0 if value <= 10.0**low else (math.log10(value) - low) / (high - low)

        return logarithmic, [10.0**power for power in range(low, high + 1, step)]
    raw = most / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step_size = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    count = math.ceil(most / step_size - 1e-9)
    return lambda value: value / (count * step_size), [number * step_size for number in range(count + 1)]


def _description(points: Sequence[Point], series: Sequence[str]) -> str:
    said = []
    for number, name in enumerate(series):
        values = [(value, point.name) for point in points if (value := point.values[number]) is not None]
        if values:
            most, where = max(values)
            said.append(
                f"{name}: {percent(values[0][0])} at the first site, {percent(values[-1][0])} at the last, "
                f"at most {percent(most)} at {where}"
            )
    return "; ".join(said)


def figure(width: int, height: int, label: str, description: str) -> ElementTree.Element:
    """Return an empty chart with its name and what it shows, for those who hear it."""
    root = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height), "role": "img"}
    )
    ElementTree.SubElement(root, "title").text = visible(label)
    ElementTree.SubElement(root, "desc").text = visible(description)
    return root


def add(
    parent: ElementTree.Element, tag: str, classes: str, text: str | None = None, **attributes: float | str
) -> ElementTree.Element:
    """Add an element with classes, a text and attributes; numbers are rounded."""
    written = {
        name: value if isinstance(value, str) else f"{value:.6g}" for name, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, {"class": classes, **written})
    if text is not None:
        element.text = visible(text)
    return element


def markup(root: ElementTree.Element) -> Markup:
    """Return a chart as what a page holds."""
    return Markup(ElementTree.tostring(root, "unicode"))
