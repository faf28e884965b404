"""What all trials together say: expected scores of plans, and of every method at every choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from normsearch.searching.space import SearchSpace
from normsearch.searching.surrogate import PlanSurrogate, Space, without_outliers
from normsearch.searching.tables import Table


@dataclass(frozen=True)
class Effect:
    """What a method at one choice is expected to change, all else as in a plan.

    Attributes:
        mean: expected score less the plan's own; positive is better. 0 for the plan's own method.
        deviation: standard deviation of the expected score.
        trials: how many finished trials had the method there.

    """

    mean: float
    deviation: float
    trials: int


class Posterior:
    """The Gaussian process of ``NormSampler`` over a space, given finished trials; larger is better.

    Args:
        space: what is searched.
        trials: finished trials, at least two.
        scores: their scores.
        prior: what sensing found.

    """

    def __init__(
        self,
        space: SearchSpace,
        trials: Sequence[FrozenTrial],
        scores: Sequence[float],
        prior: Table | None = None,
    ) -> None:
        self._choices = [choice for choice in space.choices if len(choice.methods) > 1]
        self._numbers = {spelling: number for number, spelling in enumerate(space.methods)}
        allowed = np.zeros((len(self._choices), len(space.methods)), dtype=bool)
        for row, choice in enumerate(self._choices):
            allowed[row, [self._numbers[m] for m in choice.methods]] = True
        plans = np.array([self._read(trial.params) for trial in trials])
        table = None
        if prior is not None:
            table = np.array(
                [[prior.get(c.name, {}).get(m, 0.0) for m in space.methods] for c in self._choices]
            )
        self._plans, self._methods = plans, space.methods
        values = without_outliers(np.array(scores, dtype=np.float64))
        self._surrogate = PlanSurrogate(Space(allowed), plans, values, table)

    def expected(self) -> list[float]:
        """Return the expected score of each trial's plan, noise taken out."""
        return [float(mean) for mean in self._surrogate.predict(self._plans)[0]]

    def effects(self, params: Mapping[str, Any]) -> dict[str, dict[str, Effect]]:
        """Return, by choice and method, what a change of a plan would do."""
        plan = self._read(params)
        own = float(self._surrogate.predict(plan[None])[0][0])
        found: dict[str, dict[str, Effect]] = {}
        for row, choice in enumerate(self._choices):
            numbers = [self._numbers[m] for m in choice.methods]
            changed = np.tile(plan, (len(numbers), 1))
            changed[:, row] = numbers
            means, deviations = self._surrogate.predict(changed)
            found[choice.name] = {
                m: Effect(float(mean) - own, float(deviation), int((self._plans[:, row] == number).sum()))
                for m, number, mean, deviation in zip(choice.methods, numbers, means, deviations, strict=True)
            }
        return found

    def _read(self, params: Mapping[str, Any]) -> NDArray[np.int64]:
        return np.array([self._numbers[params[choice.name]] for choice in self._choices])
