"""What a plan must keep to: constraints of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normsearch.errors import SearchError


@dataclass(frozen=True)
class MaxDrop:
    """The first objective may be at most ``drop`` worse than the original network's.

    The original is trained and scored once by the same objective, with a trial that has no parameters.
    """

    drop: float

    def __post_init__(self) -> None:
        _check("MaxDrop", self.drop, at_least=0.0)


@dataclass(frozen=True)
class MaxLatency:
    """A forward pass may take at most ``ratio`` times the original's, by the table of costs.

    Plans above it are not trained, and ``NormSampler`` proposes none while there are others.
    """

    ratio: float

    def __post_init__(self) -> None:
        _check("MaxLatency", self.ratio, at_least=0.0)


@dataclass(frozen=True)
class MaxMemory:
    """What is kept for the backward pass may be at most ``ratio`` times the original's, by the cost table.

    Plans above it are not trained, and ``NormSampler`` proposes none while there are others.
    """

    ratio: float

    def __post_init__(self) -> None:
        _check("MaxMemory", self.ratio, at_least=0.0)


@dataclass(frozen=True)
class BatchIndependent:
    """No sample's output may depend on the other samples of its batch: such methods are never tried."""


Constraint = MaxDrop | MaxLatency | MaxMemory | BatchIndependent
KINDS: dict[str, type[Constraint]] = {
    kind.__name__: kind for kind in (MaxDrop, MaxLatency, MaxMemory, BatchIndependent)
}
#: Which cost a constraint is about.
CEILINGS: dict[type, str] = {MaxLatency: "latency", MaxMemory: "memory"}


def checked(constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """Return constraints as a tuple, each kind once.

    Raises:
        SearchError: something else is among them, or a kind occurs twice.

    """
    given = (constraints,) if isinstance(constraints, Constraint) else tuple(constraints)
    for one in given:
        if not isinstance(one, Constraint):
            raise SearchError(
                f"{one!r} is no constraint; there are {', '.join(KINDS)} in normsearch.searching"
            )
    kinds = [type(one) for one in given]
    if len(set(kinds)) < len(kinds):
        raise SearchError(f"a constraint occurs twice in {', '.join(map(repr, given))}; give each once")
    return given


def _check(name: str, value: float, at_least: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < at_least:
        raise SearchError(f"{name}({value!r}): give a finite number, at least {at_least:g}")
