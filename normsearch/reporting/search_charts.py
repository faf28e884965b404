"""Charts of a search: plans and their scores, trials one after another, and the Pareto front.

Drawn as in ``charts``: inline SVG whose colours are the page's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, quantiles, stdev
from xml.etree import ElementTree

from markupsafe import Markup

from normsearch.reporting.charts import Frame, add, figure, markup
from normsearch.reporting.search_sections import Front, FrontPoint, Scores, TrialPoint, Trials
from normsearch.text import visible

#: What an origin's mark looks like, within a unit circle; colours are the page's.
_SHAPES: dict[str, Sequence[tuple[float, float]]] = {
    "uniform": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "prior": ((0, -1.1), (1.05, 0.8), (-1.05, 0.8)),
    "learned": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    "below": ((-1, -0.6), (1, -0.6), (0, 1.1)),
    "above": ((-1, 0.6), (1, 0.6), (0, -1.1)),
    "left": ((0.6, -1), (0.6, 1), (-1.1, 0)),
    "right": ((-0.6, -1), (-0.6, 1), (1.1, 0)),
    "sampler": tuple((math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)),
}
#: Scores further below the middle half than so many times its spread are drawn at the edge, if they are few.
_FAR, _FEW = 3.0, 0.1
_LONGEST_NAME = 26


def scores_chart(scores: Scores, *, width: int) -> Markup:
    """Draw a line per plan: its score in the search, and those in the confirmation with their spread."""
    wide = width > 600
    confirmed = [score for row in scores.rows for score in row.scores]
    single = [row.searched for row in scores.rows if row.searched is not None]
    values = [*confirmed, *_near(single, maximize=scores.goal.maximize)]
    step = 34 if wide else 46
    frame = Frame(
        width,
        height=40 + step * len(scores.rows),
        left=min(34 + 7 * max(len(_shortened(row.name)) for row in scores.rows), 210) if wide else 24,
        right=24,
        top=8,
        bottom=32,
    )
    low, high, ticks = _axis(values)
    label = f"{scores.goal.name} of each plan"
    root = figure(width, frame.height, label, _said_scores(scores))

    def x(value: float) -> float:
        return frame.x(min(max((value - low) / (high - low), 0.0), 1.0))

    for tick in ticks:
        add(root, "line", "grid", x1=x(tick), x2=x(tick), y1=frame.top, y2=frame.height - frame.bottom)
    for tick in ticks if wide else ticks[:: max(1, len(ticks) // 4)]:
        add(root, "text", "tick middle", f"{tick:,.6g}", x=x(tick), y=frame.height - 12)
    for number, row in enumerate(scores.rows):
        y = frame.top + step * number + (step / 2 if wide else step - 15)
        classes = "tick strong" if row.chosen else "tick"
        name = _shortened(row.name)
        if wide:
            add(root, "text", f"{classes} end", name, x=frame.left - 12, y=y + 4)
        else:
            add(root, "text", classes, name, x=frame.left, y=y - 13)
        add(root, "line", "rail", x1=frame.left, x2=frame.width - frame.right, y1=y, y2=y)
        if row.searched is not None:
            _mark(
                root, "searched", "sampler", x(row.searched), y, 5, f"{row.name}: {row.searched:.4g}, search"
            )
        _confirmed(root, row.name, row.scores, x, y)
    return markup(root)


def _confirmed(
    root: ElementTree.Element, name: str, scores: Sequence[float], x: Callable[[float], float], y: float
) -> None:
    """Draw the scores of every seed, their mean and its standard error."""
    if not scores:
        return
    mean = fmean(scores)
    error = stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    if error:
        add(root, "line", "spread", x1=x(mean - error), x2=x(mean + error), y1=y, y2=y)
    for score in scores:
        _mark(root, "seed", "sampler", x(score), y, 3, f"{name}: {score:.4g}, one seed")
    bar = add(root, "line", "mean", x1=x(mean), x2=x(mean), y1=y - 9, y2=y + 9)
    ElementTree.SubElement(bar, "title").text = visible(f"{name}: mean {mean:.4g} ± {error:.2g}")


def trials_chart(trials: Trials, *, width: int) -> Markup:
    """Draw the first goal's score by trial, the best so far as a line, and what has no score at the foot."""
    frame = Frame(width, height=320, left=64 if width > 600 else 46, top=14, bottom=52)
    goal = trials.goals[0]
    scored = [row for row in trials.rows if row.values]
    values = [row.values[0] for row in scored]
    low, high, ticks = _axis(_near(values, maximize=goal.maximize))
    root = figure(width, frame.height, f"{goal.name} by trial", _said_trials(trials))
    count = max((row.number for row in trials.rows), default=0) + 1

    def x(number: int) -> float:
        return frame.x((number + 0.5) / count)

    def y(value: float) -> float:
        return frame.y(min(max((value - low) / (high - low), 0.0), 1.0))

    for tick in ticks:
        add(root, "line", "grid", x1=frame.left, x2=frame.width - frame.right, y1=y(tick), y2=y(tick))
        add(root, "text", "tick end", f"{tick:,.6g}", x=frame.left - 8, y=y(tick) + 4)
    foot = frame.height - frame.bottom + 14
    for number in range(0, count, _stride(count, 10 if width > 600 else 5)):
        add(root, "text", "tick middle", str(number), x=x(number), y=frame.height - 8)
    best = running_best(trials)
    path: list[tuple[float, float]] = []
    for number, value in best:
        if path:
            path.append((x(number), path[-1][1]))
        path.append((x(number), y(value)))
    if path:
        path.append((frame.width - frame.right, path[-1][1]))
        add(root, "polyline", "line best", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in path))
    size = 5.0 if count <= 120 else 3.5
    # The plan that was taken is drawn last, above the others.
    for row in sorted(scored, key=lambda row: row.chosen):
        shape = "below" if row.values[0] < low else "above" if row.values[0] > high else row.origin
        classes = f"mark {row.origin}{'' if row.state == 'complete' else ' infeasible'}"
        place = x(row.number), y(row.values[0])
        if row.chosen:
            add(root, "circle", "ring", cx=place[0], cy=place[1], r=size + 4)
        beyond = "" if shape == row.origin else ", beyond the axis"
        _mark(root, classes, shape, *place, size, told(row) + beyond)
    for row in trials.rows:
        if row.state in ("failed", "pruned"):
            _cross(root, x(row.number), foot, told(row))
    return markup(root)


def beyond(trials: Trials) -> str | None:
    """Return where scores lie that are drawn at the edge, ``below`` or ``above``; None without any."""
    values = [row.values[0] for row in trials.rows if row.values]
    maximize = trials.goals[0].maximize
    if len(_near(values, maximize=maximize)) == len(values):
        return None
    return "below" if maximize else "above"


def running_best(trials: Trials) -> list[tuple[int, float]]:
    """Return the trials that were the best so far, of those that meet the constraints, with their scores."""
    better = max if trials.goals[0].maximize else min
    best: list[tuple[int, float]] = []
    for row in trials.rows:
        if row.state == "complete" and (not best or better(row.values[0], best[-1][1]) != best[-1][1]):
            best.append((row.number, row.values[0]))
    return best


def front_chart(front: Front, other: int, *, width: int) -> Markup:
    """Draw the trials by another goal and the first one, and the front as a line."""
    frame = Frame(width, height=320, left=64 if width > 600 else 46, top=14, bottom=48)
    goal, beside = front.goals[0], front.goals[other]
    points = front.points
    low_y, high_y, ticks_y = _axis(_near([p.values[0] for p in points], maximize=goal.maximize))
    scale, unit = units(beside.name, [p.values[other] for p in points])
    low_x, high_x, ticks_x = _axis([scale * p.values[other] for p in points])
    root = figure(width, frame.height, f"{goal.name} by {beside.name}", _said_front(front, other))

    def x(value: float) -> float:
        return frame.x((scale * value - low_x) / (high_x - low_x))

    def y(value: float) -> float:
        return frame.y(min(max((value - low_y) / (high_y - low_y), 0.0), 1.0))

    for tick in ticks_y:
        add(root, "line", "grid", x1=frame.left, x2=frame.width - frame.right, y1=y(tick), y2=y(tick))
        add(root, "text", "tick end", f"{tick:,.6g}", x=frame.left - 8, y=y(tick) + 4)
    for tick in ticks_x if width > 600 else ticks_x[:: max(1, len(ticks_x) // 4)]:
        place = x(tick / scale)
        add(root, "line", "grid", x1=place, x2=place, y1=frame.top, y2=frame.height - frame.bottom)
        add(root, "text", "tick middle", f"{tick:,.6g}", x=place, y=frame.height - 28)
    add(root, "text", "tick middle", beside.name + unit, x=frame.x(0.5), y=frame.height - 8)
    if len(front.goals) == 2:
        best = [(x(p.values[other]), y(p.values[0])) for p in points if p.best]
        corners = _staircase(best, maximize=beside.maximize)
        add(root, "polyline", "line best", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))
    for point in sorted(points, key=lambda p: (p.chosen, p.best)):
        score = point.values[0]
        edge = "below" if score < low_y else "above" if score > high_y else None
        _front_mark(root, front, point, (x(point.values[other]), y(score)), edge)
    return markup(root)


def _staircase(places: Sequence[tuple[float, float]], *, maximize: bool) -> list[tuple[float, float]]:
    """Return the edge of what a front beats, from left to right: each corner is beaten by both its ends."""
    corners: list[tuple[float, float]] = []
    for place in sorted(places):
        if corners:
            before = corners[-1]
            corners.append((before[0], place[1]) if maximize else (place[0], before[1]))
        corners.append(place)
    return corners


def _front_mark(
    root: ElementTree.Element, front: Front, point: FrontPoint, place: tuple[float, float], edge: str | None
) -> None:
    kind = "sampler" if point.name is None else "uniform"
    if point.chosen:
        add(root, "circle", "ring", cx=place[0], cy=place[1], r=9)
    said = ", ".join(f"{g.name} {v:.4g}" for g, v in zip(front.goals, point.values, strict=True))
    name = point.name or f"trial {point.number}"
    where = f"{', on the front' if point.best else ''}{', beyond the axis' if edge else ''}"
    classes = f"mark {kind}{'' if point.best else ' beaten'}"
    _mark(root, classes, edge or kind, *place, 5, f"{name}: {said}{where}")


def key(kind: str) -> Markup:
    """Return the mark of a legend: an origin, or one of searched, seed, mean, best, failed and infeasible."""
    root = figure(18, 16, kind, kind)
    root.set("class", "keymark")
    if kind in ("below", "above"):
        _mark(root, "mark plain", kind, 9, 8, 5, "")
    elif kind in _SHAPES:
        _mark(root, f"mark {kind}", kind, 9, 8, 5, "")
    elif kind in ("searched", "seed"):
        _mark(root, kind, "sampler", 9, 8, 5 if kind == "searched" else 3, "")
    elif kind == "mean":
        add(root, "line", "spread", x1=2, x2=16, y1=8, y2=8)
        add(root, "line", "mean", x1=9, x2=9, y1=1, y2=15)
    elif kind == "best":
        add(root, "polyline", "line best", points="1,11 9,11 9,5 17,5")
    elif kind == "infeasible":
        _mark(root, "mark sampler infeasible", "sampler", 9, 8, 5, "")
    elif kind == "beaten":
        _mark(root, "mark sampler beaten", "sampler", 9, 8, 5, "")
    elif kind == "taken":
        add(root, "circle", "ring", cx=9, cy=8, r=6.5)
    else:
        _cross(root, 9, 8, "")
    return markup(root)


def share_bar(share: float, label: str) -> Markup:
    """Draw a share of one as a bar."""
    root = figure(180, 12, label, f"{100 * share:.1f} %")
    add(root, "rect", "rail", x=0, y=0, width=180, height=12)
    add(root, "rect", "part p2", x=0, y=0, width=max(180 * share, 1), height=12)
    return markup(root)


def units(name: str, values: Sequence[float]) -> tuple[float, str]:
    """Return what a cost is multiplied by to be read, and the unit to write after its name."""
    most = max(map(abs, values), default=0.0)
    if name == "latency":
        return (1e3, ", ms") if most >= 1e-3 else (1e6, ", µs")
    if name == "memory":
        return (2.0**-20, ", MiB") if most >= 2**20 else (2.0**-10, ", KiB")
    return 1.0, ""


def told(row: TrialPoint) -> str:
    """Return a trial in words."""
    name = f"trial {row.number}" + ("" if row.name is None else f", {row.name}")
    values = ", ".join(f"{value:.4g}" for value in row.values)
    state = "" if row.state == "complete" else f", {row.state}"
    reason = "" if row.reason is None else f"; {row.reason}"
    return f"{name} ({row.origin}){state}{f': {values}' if values else ''}{reason}"


def _mark(
    root: ElementTree.Element, classes: str, shape: str, x: float, y: float, size: float, title: str
) -> None:
    corners = [(x + size * dx, y + size * dy) for dx, dy in _SHAPES[shape]]
    mark = add(root, "polygon", classes, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))
    if title:
        ElementTree.SubElement(mark, "title").text = visible(title)


def _cross(root: ElementTree.Element, x: float, y: float, title: str) -> None:
    cross = add(root, "path", "cross", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8")
    if title:
        ElementTree.SubElement(cross, "title").text = visible(title)


def _near(values: Sequence[float], *, maximize: bool) -> list[float]:
    """Return the values without a few that are so far on the bad side that they would hide differences."""
    if len(values) < 4:
        return list(values)
    first, _, third = quantiles(values, n=4)
    reach = _FAR * (third - first)
    kept = [v for v in values if (v >= first - reach if maximize else v <= third + reach)]
    few = len(values) - len(kept) <= max(1, _FEW * len(values))
    return kept if third > first and few else list(values)


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Return the ends of a linear axis that holds all values, and its ticks."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _stride(count: int, most: int) -> int:
    """Return the least of 1, 2, 5, 10, … that leaves at most so many numbers."""
    stride = 1
    for factor in (2, 2.5, 2) * 9:
        if count <= most * stride:
            break
        stride = round(stride * factor)
    return stride


def _shortened(name: str) -> str:
    shown = visible(name)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def _said_scores(scores: Scores) -> str:
    said = []
    for row in scores.rows:
        parts = [] if row.searched is None else [f"{row.searched:.4g} in the search"]
        if row.scores:
            parts.append(f"{fmean(row.scores):.4g} confirmed")
        said.append(f"{row.name}: {', '.join(parts) or 'no score'}")
    return "; ".join(said)


def _said_trials(trials: Trials) -> str:
    best = running_best(trials)
    reached = f"; the best is {best[-1][1]:.4g}, at trial {best[-1][0]}" if best else ""
    return f"{len(trials.rows)} trials{reached}"


def _said_front(front: Front, other: int) -> str:
    best = sorted((p for p in front.points if p.best), key=lambda p: p.values[other])
    said = [f"{p.name or f'trial {p.number}'}: {p.values[0]:.4g}, {p.values[other]:.4g}" for p in best]
    return f"{len(best)} of {len(front.points)} trials are on the front: {'; '.join(said)}"
