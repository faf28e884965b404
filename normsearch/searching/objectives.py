"""One trial: a plan's parameters in, the objective's numbers out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optuna.exceptions import TrialPruned
from optuna.study import Study, StudyDirection
from optuna.trial import FixedTrial, Trial, TrialState
from torch import nn

from normsearch.errors import SearchError
from normsearch.forward import copied
from normsearch.plans import Plan
from normsearch.searching.constraints import CEILINGS, Constraint, MaxDrop, MaxLatency, MaxMemory
from normsearch.searching.costs import CostTable
from normsearch.searching.learned import learned_params
from normsearch.searching.outcomes import scores_in
from normsearch.searching.resident import Resident
from normsearch.searching.space import SearchSpace

#: Trains and scores a converted network, or only scores it: one number, or one for each direction.
Objective = Callable[[nn.Module, Any], float | Sequence[float]]


@dataclass(frozen=True)
class Evaluation:
    """What one run of the objective needs besides the trial.

    Attributes:
        resident: the model.
        space: what is searched.
        objective: the user's function.
        directions: of the objective's own numbers.
        costs: names of costs that follow the objective's numbers.
        table: of the costs; None where nothing asks for one.
        constraints: what plans must keep to.
        reference: the objective's first number for the original, where a constraint asks for it.
        seed: of all generators at the start of every trial, so that plans meet the same batches.

    """

    resident: Resident
    space: SearchSpace
    objective: Objective
    directions: tuple[str, ...]
    costs: tuple[str, ...] = ()
    table: CostTable | None = None
    constraints: tuple[Constraint, ...] = ()
    reference: float | None = None
    seed: int = 0

    def trial(self, study: Study, trial: Trial) -> tuple[float, ...]:
        """Convert, run the objective and return its numbers, costs appended.

        Raises:
            TrialPruned: a known cost is above its ceiling.
            SearchError: the objective returned something else than finite numbers.

        """
        plan = self.space.plan(trial.params)
        over = self.judged(trial)
        if over:
            raise TrialPruned(
                "; ".join(f"{name}: {by:.3g} above what is allowed" for name, by in over.items())
            )
        learned: Mapping[str, str] | None = None
        with seeded(self.seed), self.resident.converted(plan) as model:
            values = self.numbers(self.objective(model, trial))
            if self.space.uniform_method(trial.params) is not None:
                learned = learned_params(model, plan, self.space)
        self.judged(trial, values[0])
        if learned is not None:
            _enqueue(study, learned, "learned")
        return (*values, *self._cost(plan))

    def original(self) -> tuple[float, ...]:
        """Return the objective's numbers for the network as it was given."""
        with seeded(self.seed), self.resident.borrowed() as model:
            return self.numbers(self.objective(model, FixedTrial({})))

    def again(
        self, run: Objective, params: Mapping[str, Any], number: int, seed: int, *, keep: bool = False
    ) -> tuple[float, nn.Module | None]:
        """Return the first number of a plan under another seed, and the trained network if it is kept."""
        trial = FixedTrial(dict(params), number=number)
        for name, distribution in self.space.distributions.items():
            # ``trial.params`` holds what was suggested, as it did in the search.
            trial.suggest_categorical(name, distribution.choices)
        with seeded(seed), self.resident.converted(self.space.plan(params)) as model:
            value = self.numbers(run(model, trial))[0]
            return value, copied(model) if keep else None

    def excess(self, plan: Plan) -> dict[str, float]:
        """Return how far known costs are above their ceilings, as a share of the original's."""
        found = {}
        for constraint in self.constraints:
            if isinstance(constraint, MaxLatency | MaxMemory):
                assert self.table is not None
                cost = CEILINGS[type(constraint)]
                ratio = self.table.of(plan, cost) / (self.table.base(cost) or 1.0)
                found[type(constraint).__name__] = ratio - constraint.ratio
        return found

    def judged(self, trial: Trial, score: float | None = None) -> dict[str, float]:
        """Keep how far a trial is above its ceilings and, given its score, below the original.

        Returns:
            Those constraints that it violates, and by how much.

        """
        found = self.excess(self.space.plan(trial.params))
        if score is not None and self.reference is not None:
            drop = self.reference - score
            if self.directions[0] == "minimize":
                drop = -drop
            limit = next(c.drop for c in self.constraints if isinstance(c, MaxDrop))
            found["MaxDrop"] = drop - limit
        for name, value in found.items():
            if name not in trial.constraints:
                trial.set_constraint(name, value)
        return {name: value for name, value in found.items() if value > 0}

    def with_costs(self, trial: Trial, told: Any) -> tuple[float, ...]:
        """Return a trial's numbers, as its objective was run by hand, with the plan's costs.

        What ``trial`` returned has them already.

        Raises:
            SearchError: they are not finite numbers, one for each direction.

        """
        own = len(self.directions)
        if self.costs and isinstance(told, Sequence) and len(told) == own + len(self.costs):
            told = told[:own]
        values = scores_in(
            told,
            len(self.directions),
            what=f"trial {trial.number} was told",
            way_out="give finite numbers, or None for a trial that failed",
        )
        return (*values, *self._cost(self.space.plan(trial.params)))

    def numbers(self, returned: Any) -> tuple[float, ...]:
        """Return what the objective returned as finite numbers, one for each direction.

        Raises:
            SearchError: it is anything else.

        """
        return scores_in(returned, len(self.directions))

    def _cost(self, plan: Plan) -> tuple[float, ...]:
        return tuple(0.0 if self.table is None else self.table.of(plan, cost) for cost in self.costs)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's, NumPy's and Python's generators seeded; give their states back afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 (users' transforms use the old one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def _enqueue(study: Study, params: Mapping[str, str], origin: str) -> None:
    """Let a plan be tried next, unless it was or will be."""
    trials = study.get_trials(deepcopy=False)
    waiting = [t.system_attrs.get("fixed_params", {}) for t in trials if t.state == TrialState.WAITING]
    known = [*(t.params for t in trials), *waiting]
    if not any(all(one.get(name) == value for name, value in params.items()) for one in known):
        study.enqueue_trial(dict(params), user_attrs={"origin": origin})


def direction_names(directions: Sequence[str]) -> tuple[str, ...]:
    """Return directions as a tuple of ``maximize`` and ``minimize``.

    Raises:
        SearchError: another word, or none.

    """
    given = (directions,) if isinstance(directions, str) else tuple(directions)
    known = [direction.name.lower() for direction in (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)]
    if not given or any(one not in known for one in given):
        raise SearchError(f"directions={directions!r}: give 'maximize' or 'minimize' for each number")
    return given
