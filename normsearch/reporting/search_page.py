"""What the templates of a search's sections need beside what they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, quantiles, stdev
from typing import Any

from normsearch.reporting import search_charts
from normsearch.reporting.search_sections import Effects, Front, FrontPoint, Scores, SearchPart, Trials

#: What the origins of trials are called, in the order of a legend.
ORIGINS = {
    "uniform": "uniform plan",
    "prior": "from sensing",
    "learned": "from learned gates",
    "sampler": "proposed",
}
#: Upper bounds of the colours of worse and neutral effects, as shares of the scale; better ones mirror them.
_BOUNDS = (-0.8, -0.35, -0.08)


def effect_scale(effects: Effects) -> float:
    """Return the gain or loss that has the strongest colour: the largest but for a tenth of all cells."""
    sizes = [abs(cell.mean) for row in effects.rows for cell in row.cells if cell is not None]
    sizes = [size for size in sizes if size > 0]
    if len(sizes) < 2:
        return sizes[0] if sizes else 1.0
    return quantiles(sizes, n=10, method="inclusive")[-1]


def effect(mean: float, scale: float) -> int:
    """Return the colour of an effect: 0 much worse, 3 no change, 6 much better."""
    share = mean / scale
    if share <= _BOUNDS[-1]:
        return next(number for number, bound in enumerate(_BOUNDS) if share <= bound)
    return 6 - next((number for number, bound in enumerate(_BOUNDS) if share >= -bound), 3)


def effect_legend(scale: float) -> list[str]:
    """Return what each colour of an effect stands for."""
    bounds = [scale * bound for bound in _BOUNDS]
    worse = [f"≤ {change(bound)}" for bound in bounds]
    return [*worse, "no change", *(f"≥ {change(-bound)}" for bound in reversed(bounds))]


def change(value: float, digits: int = 2) -> str:
    """Return a difference with its sign and few digits."""
    return f"{value:+,.{digits}g}" if value else "0"


def large(value: int) -> str:
    """Return a number that may have many digits."""
    return f"{value:,}" if value < 10**9 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def error(scores: Sequence[float]) -> float:
    """Return the standard error of the mean of two scores or more."""
    return stdev(scores) / math.sqrt(len(scores))


def origins(trials: Trials) -> list[str]:
    """Return the origins that occur."""
    there = {row.origin for row in trials.rows}
    return [origin for origin in ORIGINS if origin in there]


def in_order(points: Sequence[FrontPoint], front: Front) -> list[FrontPoint]:
    """Return points from the best of the first goal on."""
    sign = -1.0 if front.goals[0].maximize else 1.0
    return sorted(points, key=lambda point: (sign * point.values[0], point.number))


def finished(search: SearchPart) -> int:
    """Return how many trials have ended."""
    return sum(n for state, n in search.states.items() if state not in ("running", "waiting"))


def _units(front: Front, goal: int) -> tuple[float, str]:
    return search_charts.units(front.goals[goal].name, [point.values[goal] for point in front.points])


def _scores_chart(scores: Scores, width: int) -> Any:
    return search_charts.scores_chart(scores, width=width)


def _trials_chart(trials: Trials, width: int) -> Any:
    return search_charts.trials_chart(trials, width=width)


def _front_chart(front: Front, other: int, width: int) -> Any:
    return search_charts.front_chart(front, other, width=width)


#: The filters of the templates.
SEARCH_FILTERS: dict[str, Any] = {
    "beyond": search_charts.beyond,
    "change": change,
    "effect": effect,
    "effect_legend": effect_legend,
    "effect_scale": effect_scale,
    "error": error,
    "finished": finished,
    "front_chart": _front_chart,
    "goal_unit": lambda front, goal: _units(front, goal)[1],
    "in_order": in_order,
    "in_unit": lambda front, goal, value: _units(front, goal)[0] * value,
    "key": search_charts.key,
    "large": large,
    "mean": fmean,
    "origins": origins,
    "scores_chart": _scores_chart,
    "share_bar": search_charts.share_bar,
    "trials_chart": _trials_chart,
}
