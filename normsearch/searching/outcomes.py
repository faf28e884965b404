"""Outcomes: what came of running an objective, and whether it fails again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.trial import TrialState
from torch import Tensor

from normsearch.errors import SearchError

#: So many first trials that fail in the same way are no accident.
_SAME_FAILURES = 3
LONGEST_ERROR = 1000
_LONGEST_VALUE = 60
#: Larger scores are those of networks that diverged; squares of theirs must be finite too.
_LARGEST = 1e100
_WAY_OUT = "give finite numbers, or raise optuna.TrialPruned for a plan that is to be given up"


@dataclass(frozen=True)
class Outcome:
    """What became of an evaluation."""

    state: TrialState
    values: list[float] | None = None
    error: str = ""
    cause: Exception | None = None


@dataclass
class Failures:
    """The first outcomes, as long as they are the same failure."""

    same: list[str] | None = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Take note of one more.

        Raises:
            SearchError: the first few are the same failure.

        """
        if self.same is None:
            return
        if outcome.state != TrialState.FAIL or (self.same and self.same[0] != outcome.error):
            self.same = None
            return
        self.same.append(outcome.error)
        if len(self.same) == _SAME_FAILURES:
            raise SearchError(
                f"the first {_SAME_FAILURES} trials all failed: {outcome.error}; mend the objective, then "
                "start again"
            ) from outcome.cause


def checked(returned: Any, wanted: int) -> Outcome:
    """Return the outcome of an evaluation that returned something."""
    try:
        return Outcome(TrialState.COMPLETE, list(scores_in(returned, wanted)))
    except SearchError as error:
        return failed(str(error))


def scores_in(
    returned: Any, wanted: int, *, what: str = "the objective returned", way_out: str = _WAY_OUT
) -> tuple[float, ...]:
    """Return what an objective returned as finite numbers.

    Args:
        returned: a number, or several in a list, a tuple, an array or a tensor.
        wanted: how many there are to be.
        what: how the error begins.
        way_out: how it ends where a number is not finite.

    Raises:
        SearchError: they are no numbers, not as many, not finite, or larger than 1e100.

    """
    plain = returned.tolist() if isinstance(returned, np.ndarray | np.generic | Tensor) else returned
    several = tuple(plain) if isinstance(plain, Sequence) and not isinstance(plain, str | bytes) else (plain,)
    try:
        if any(isinstance(value, str | bytes) for value in several):
            raise TypeError
        numbers = tuple(float(value) for value in several)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise SearchError(
            f"{what} {_shown(returned)}; give {'a number' if wanted == 1 else f'{wanted} numbers'}"
        ) from None
    if len(numbers) != wanted:
        asked = "one" if wanted == 1 else f"{wanted}, one for each direction"
        given = "1 number" if len(numbers) == 1 else f"{len(numbers)} numbers"
        raise SearchError(f"{what} {given}; give {asked}")
    if not all(abs(number) <= _LARGEST for number in numbers):
        raise SearchError(f"{what} {', '.join(map(str, numbers))}; {way_out}")
    return numbers


def _shown(value: Any) -> str:
    text = repr(value)
    return (
        text
        if len(text) <= _LONGEST_VALUE and "\n" not in text
        else f"something of type {type(value).__name__}"
    )


def failed(message: str, cause: Exception | None = None) -> Outcome:
    """Return the outcome of an evaluation that failed."""
    return Outcome(TrialState.FAIL, error=message[:LONGEST_ERROR], cause=cause)
