"""Encoding: trials of categoricals, and tables of what each choice adds, as numbers for the surrogate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from normsearch.errors import SearchError
from normsearch.searching.ceilings import Ceilings
from normsearch.searching.surrogate import Floats, Plans, Space
from normsearch.searching.tables import Table


class Encoding:
    """Trials as rows of numbers and back: one number per choice, shared by all parameters that have it."""

    def __init__(self, search_space: Mapping[str, BaseDistribution]) -> None:
        self.names = list(search_space)
        self._rows: dict[int, tuple[FrozenTrial, tuple[int, ...]]] = {}
        self._distributions = [d for d in search_space.values() if isinstance(d, CategoricalDistribution)]
        self.choices = [(name, d.choices) for name, d in zip(self.names, self._distributions, strict=True)]
        words: list[Any] = []
        # Of each parameter, the numbers of its choices by their index, which is what Optuna stores.
        self._numbers: list[dict[int, int]] = []
        for distribution in self._distributions:
            self._numbers.append({})
            for index in distinct(distribution):
                choice = distribution.choices[index]
                known = (number for number, word in enumerate(words) if _alike(word, choice))
                self._numbers[-1][index] = next(known, len(words))
                if self._numbers[-1][index] == len(words):
                    words.append(choice)
        self._indices = [{number: index for index, number in row.items()} for row in self._numbers]
        allowed = np.zeros((len(self.names), len(words)), dtype=bool)
        for row, numbers in enumerate(self._numbers):
            allowed[row, list(numbers.values())] = True
        self.space = Space(allowed)

    def holds(self, trial: FrozenTrial) -> bool:
        """Whether a trial has every parameter."""
        return all(name in trial.params for name in self.names)

    def read(self, trial: FrozenTrial) -> tuple[int, ...]:
        """Return a trial's plan."""
        # Finished trials do not change, and storages give the same objects again.
        known, plan = self._rows.get(trial.number, (None, ()))
        if known is not trial:
            plan = tuple(
                numbers[int(distribution.to_internal_repr(trial.params[name]))]
                for name, distribution, numbers in zip(
                    self.names, self._distributions, self._numbers, strict=True
                )
            )
            if trial.state.is_finished():
                self._rows[trial.number] = trial, plan
        return plan

    def write(self, plan: Plans) -> dict[str, Any]:
        """Return a plan as parameters."""
        return {
            name: distribution.choices[indices[int(number)]]
            for name, distribution, indices, number in zip(
                self.names, self._distributions, self._indices, plan, strict=True
            )
        }

    def uniform(self) -> list[Plans]:
        """Return the uniform plans: of every method that more than half of the sites may have.

        Where there is none, as parameters have choices of their own, the first plan has every first choice,
        the second every second one, and so on.
        """
        allowed = self.space.allowed
        common = np.flatnonzero(2 * allowed.sum(0) > len(allowed))
        if len(common):
            return [self.permitted(np.full(len(allowed), number)) for number in common]
        own = [np.flatnonzero(row) for row in allowed]
        return [np.array([row[i % len(row)] for row in own]) for i in range(max(map(len, own)))]

    def permitted(self, plan: Plans) -> Plans:
        """Return a plan with the site's first method wherever the given one may not stand."""
        fits = self.space.allowed[np.arange(len(plan)), plan]
        return np.where(fits, plan, self.space.allowed.argmax(1))

    def ceilings(self, given: Sequence[tuple[Table, float]], fixed: Mapping[str, Any]) -> Ceilings:
        """Return ceilings of tables and their limits, and one more: of changes of what is fixed, 0."""
        tables = [self.table(table) for table, _ in given]
        limits = [limit for _, limit in given]
        changes = np.zeros(self.space.allowed.shape)
        for row, name in enumerate(self.names):
            if name in fixed:
                index = int(self._distributions[row].to_internal_repr(fixed[name]))
                changes[row] = 1.0
                changes[row, self._numbers[row][index]] = 0.0
        if changes.any():
            tables.append(changes)
            limits.append(0.0)
        stacked = np.array(tables).reshape(-1, *self.space.allowed.shape)
        return Ceilings(self.space, stacked, np.array(limits, dtype=np.float64))

    def table(self, given: Table) -> Floats:
        """Return a table as (L, K); what it does not name counts as the mean of what it does."""
        result = np.zeros(self.space.allowed.shape)
        for row, name in enumerate(self.names):
            known = self._known(row, given.get(name, {}))
            result[row] = np.mean(list(known.values())) if known else 0.0
            for number, value in known.items():
                result[row, number] = value
        return result

    def check(self, what: str, given: Table, others: Set[str], *, whole: bool) -> None:
        """Raise a ``SearchError`` for a table that names no parameter that there is, or no choice of one.

        Args:
            what: how the error begins.
            given: the table.
            others: parameters that trials have beside these.
            whole: whether every choice of a parameter must be named; a name that no trial has is then
                warned of.

        """
        unknown = [name for name in given if name not in self.names and name not in others]
        if given and len(unknown) == len(given):
            raise SearchError(
                f"{what} is for {_some(given)}, and the study's parameters are {_some(self.names)}; give "
                "{parameter: {choice: number}}"
            )
        if whole and unknown:
            message = f"{what} names {_some(unknown)}, which no trial has as a parameter yet"
            warnings.warn(message, stacklevel=2)
        for row, name in enumerate(self.names):
            known = self._known(row, given.get(name, {}))
            if given.get(name) and not known:
                raise SearchError(
                    f"{what}[{name!r}] is for {_some(given[name])}, and the choices are "
                    f"{_some(self._distributions[row].choices)}; give {{choice: number}}"
                )
            left = [index for index, number in self._numbers[row].items() if number not in known]
            if whole and name in given and left:
                choices = self._distributions[row].choices
                raise SearchError(
                    f"{what}[{name!r}] does not say what {_some(choices[index] for index in left)} adds; "
                    "give a number for every choice, 0 where it adds nothing"
                )

    def _known(self, row: int, given: Mapping[Any, float]) -> dict[int, float]:
        """Return the values of a parameter's choices by number, those of other choices left out."""
        known = {}
        for choice, value in given.items():
            with suppress(ValueError):
                index = int(self._distributions[row].to_internal_repr(choice))
                known[self._numbers[row][index]] = value
        return known


def distinct(distribution: CategoricalDistribution) -> list[int]:
    """Return the indices of the choices that Optuna tells apart: the first of equal ones."""
    choices = distribution.choices
    return [index for index, choice in enumerate(choices) if distribution.to_internal_repr(choice) == index]


def _alike(one: Any, other: Any) -> bool:
    """Whether two choices count as one method: equal and of one type, or both NaN."""
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _some(words: Iterable[Any]) -> str:
    """Return the first few of some names."""
    listed = [repr(word) for word in words]
    return ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")
