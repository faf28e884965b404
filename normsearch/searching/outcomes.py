"""Outcomes: what came of running an objective, and whether it fails again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import TrialState

from normsearch.errors import SearchError

#: So many first trials that fail in the same way are no accident.
_SAME_FAILURES = 3
_LONGEST_ERROR = 1000


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
    several = isinstance(returned, Sequence) and not isinstance(returned, str)
    values = list(returned) if several else [returned]
    if len(values) != wanted:
        return failed(f"the objective returned {len(values)} values, the study has {wanted} directions")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return failed(f"the objective returned {returned!r}; give numbers")
    if not all(math.isfinite(number) for number in numbers):
        return failed(f"the objective returned {returned!r}; give finite numbers")
    return Outcome(TrialState.COMPLETE, numbers)


def failed(message: str, cause: Exception | None = None) -> Outcome:
    """Return the outcome of an evaluation that failed."""
    return Outcome(TrialState.FAIL, error=message[:_LONGEST_ERROR], cause=cause)
