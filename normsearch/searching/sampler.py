"""NormSampler: an Optuna sampler for plans, studies whose parameters are categoricals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from normsearch.errors import SearchError
from normsearch.searching.acquisitions import (
    Acquisition,
    hypervolume_improvement,
    scalarisation,
    upper_bound,
)
from normsearch.searching.ceilings import Ceilings
from normsearch.searching.climbing import Climb, Goal, KnownSum
from normsearch.searching.encoding import Encoding, distinct
from normsearch.searching.surrogate import Floats, Plans, PlanSurrogate, Space, without_outliers
from normsearch.searching.tables import Table, checked_ceilings, checked_costs, checked_table, least

#: A score beyond is as bad as an infinite one: sums of squares of larger ones are.
_LARGEST = 1e100
#: How many standard deviations a proposal may hope for.
_HOPE = 2.0
_STARTS = 3


class NormSampler(BaseSampler):
    """Propose plans by a Gaussian process over assignments of methods to sites.

    The first trials are the uniform plans; then each proposal climbs, one site at a time, to where
    mean + 2·deviation of the process (see ``normsearch.searching.surrogate``) is best. With two objectives of
    which one is a known sum, it climbs to where the dominated area is expected to grow most, with others to a
    random scalarisation's best. No plan is proposed twice, and none over a ceiling, as long as there is one
    under it that was not tried; running trials count as if they had returned what is expected of them.
    Proposals depend on the seed, the trial's number and the trials so far only: a study that is resumed goes
    on as it would have.

    A trial that failed or was pruned, whose constraints are violated, or whose score is infinite (or beyond
    1e100), counts as the worst so far, and so does a score that is far below all others; one that was given
    up above a ceiling says nothing. Equal choices of a parameter (0, 0.0 and False) are one choice, as they
    are to Optuna. Parameters other than categoricals, and those that not every trial has, are sampled at
    random. Where parameters have no choices in common, the first trials take every first choice, every
    second one, and so on.

    Args:
        seed: of everything random.
        prior: what each choice of each parameter is expected to contribute to the first objective, up to a
            positive factor; how far it is trusted is fitted anew at each proposal. A hint, not a bound. A
            choice that it does not name is expected to contribute as much as the others do in the mean.
        costs: for studies with several objectives, the index of an objective that is a sum over parameters,
            and what each choice adds to it (latency, memory): it needs no model then. A parameter that is
            not named adds nothing; of one that is, every choice must be.
        ceilings: limits on known sums over parameters: what each choice adds, as for ``costs``, and the
            largest sum that a plan may have. A parameter that is sampled at random counts as its least. The
            first trial, before which no parameter is known, looks at each ceiling by itself.

    Raises:
        SearchError: ``seed`` is negative or no whole number; a table is none, or holds other than finite
            numbers; or, when a plan is asked for, a table names what is no parameter of the study or no
            choice of one, a cost or ceiling leaves out a choice, or ``costs`` names an objective that the
            study does not have.

    Example:
        >>> import optuna
        >>> from normsearch.searching import NormSampler
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(direction="maximize", sampler=NormSampler(seed=0))
        >>> def objective(trial):
        ...     plan = [trial.suggest_categorical(f"bn{i}", ["batch", "group", "layer"]) for i in range(6)]
        ...     return plan.count("group") - 2 * (plan[0] == "layer")
        >>> study.optimize(objective, n_trials=20)
        >>> study.best_value
        6.0

    """

    def __init__(
        self,
        *,
        seed: int = 0,
        prior: Table | None = None,
        costs: Mapping[int, Table] | None = None,
        ceilings: Sequence[tuple[Table, float]] = (),
    ) -> None:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
            raise SearchError(f"seed={seed!r}: give a whole number, at least 0")
        self._seed = int(seed)
        self._prior = None if prior is None else checked_table("prior", prior)
        self._costs = checked_costs({} if costs is None else costs)
        self._ceilings = checked_ceilings(ceilings)
        self._spaces = IntersectionSearchSpace()
        self._problem: Encoding | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the categoricals that every complete trial has, in the order of the first.

        As long as none is complete, those that all others have.
        """
        done = _trials(study, TrialState.COMPLETE)
        others = _trials(study, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING)
        shared = self._spaces.calculate(study) if done else _shared(others)
        space = {
            name: distribution
            for name, distribution in shared.items()
            if isinstance(distribution, CategoricalDistribution) and len(distinct(distribution)) > 1
        }
        first = next((t for t in done if set(space) <= set(t.params)), None)
        order = list(space) if first is None else [name for name in first.params if name in space]
        return {name: space[name] for name in order}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next plan."""
        if not search_space:
            return {}
        fixed = _fixed(trial)
        if fixed.keys() >= search_space.keys():
            return {}
        problem = Encoding(search_space)
        if self._problem is not None and self._problem.choices == problem.choices:
            problem = self._problem
        else:
            self._check(problem, study)
        self._problem = problem
        rng = np.random.default_rng([self._seed, trial.number])
        done = [t for t in _trials(study, TrialState.COMPLETE) if problem.holds(t)]
        running = [
            t for t in _trials(study, TrialState.RUNNING) if problem.holds(t) and t.number != trial.number
        ]
        broken = [t for t in _trials(study, TrialState.FAIL, TrialState.PRUNED) if problem.holds(t)]
        seen = {problem.read(t) for t in (*done, *running, *broken)}
        limits = self._limits(problem, study, fixed)
        ceilings = problem.ceilings(limits, fixed)
        first = next((plan for plan in self._first(problem, ceilings) if tuple(plan) not in seen), None)
        if first is None and len(done) < 2:
            first = ceilings.another(seen, rng)
        if first is not None:
            return problem.write(first)
        # What was given up above a ceiling says nothing of those below.
        done += [t for t in broken if problem.ceilings(limits, {}).permit(np.array(problem.read(t)))]
        plans = np.array([problem.read(t) for t in done])
        waiting = np.array([problem.read(t) for t in running]).reshape(-1, len(search_space))
        goals = [
            self._goal(problem, study, index, plans, done, waiting) for index in range(len(study.directions))
        ]
        allowed = np.array([_allowed(trial) for trial in done])
        search = Climb(problem.space, goals, self._promise(goals, plans[allowed], rng), ceilings, seen)
        starts = [*search.best_of(plans, _STARTS - 1), problem.space.random(rng)]
        return problem.write(search.climb(starts, rng))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a choice at random; the first trial of a study takes first choices: a uniform plan.

        Choices after which no others keep a ceiling are left out, unless all are.
        """
        if isinstance(param_distribution, CategoricalDistribution):
            known = {**_fixed(trial), **trial.params}
            choices = [
                choice
                for choice in param_distribution.choices
                if all(least(table, {**known, param_name: choice}) <= m for table, m in self._ceilings)
            ] or param_distribution.choices
            if trial.number == 0:
                return choices[0]
            return choices[int(self._drawn(trial, param_name).integers(len(choices)))]
        from optuna.samplers import RandomSampler

        elsewhere = RandomSampler(seed=int(self._drawn(trial, param_name).integers(2**32)))
        return elsewhere.sample_independent(study, trial, param_name, param_distribution)

    def _check(self, problem: Encoding, study: Study) -> None:
        """Raise a ``SearchError`` for tables that have nothing to do with a study."""
        objectives = len(study.directions)
        for index in self._costs:
            if index >= objectives:
                raise SearchError(
                    f"costs[{index}]: the study has {objectives} objectives, numbered from 0; give "
                    "costs= for those that are known sums"
                )
        trials = study._get_trials(deepcopy=False, use_cache=True)
        others = {name for trial in trials for name in trial.distributions}.difference(problem.names)
        if self._prior is not None:
            problem.check("prior", self._prior, others, whole=False)
        for index, table in self._costs.items():
            problem.check(f"costs[{index}]", table, others, whole=True)
        for index, (table, _) in enumerate(self._ceilings):
            problem.check(f"ceilings[{index}]", table, others, whole=True)

    def _drawn(self, trial: FrozenTrial, param_name: str) -> np.random.Generator:
        """Return a parameter's own source of random numbers in a trial."""
        words = np.frombuffer(param_name.encode(), dtype=np.uint8).tolist()
        return np.random.default_rng([self._seed, trial.number, *words])

    def _limits(self, problem: Encoding, study: Study, fixed: Mapping[str, Any]) -> list[tuple[Table, float]]:
        """Return the ceilings, less what parameters add that are not proposed: at least, if not known."""
        missing = {name for table, _ in self._ceilings for name in table}.difference(problem.names)
        single: dict[str, Any] = {}
        for trial in study._get_trials(deepcopy=False, use_cache=True) if missing else []:
            for name in missing & trial.distributions.keys():
                one = trial.distributions[name]
                if isinstance(one, CategoricalDistribution) and len(distinct(one)) == 1:
                    single[name] = one.choices[0]
        return [
            (
                table,
                limit - least({name: table[name] for name in missing & table.keys()}, {**single, **fixed}),
            )
            for table, limit in self._ceilings
        ]

    def _first(self, problem: Encoding, ceilings: Ceilings) -> list[Plans]:
        """Return every uniform plan that is under the ceilings."""
        return [plan for plan in problem.uniform() if ceilings.permit(plan)]

    def _promise(self, goals: Sequence[Goal], allowed: Plans, rng: np.random.Generator) -> Acquisition:
        """Return what makes a plan worth a trial, given the plans that meet all constraints."""
        if len(goals) == 1:
            return upper_bound(_HOPE)
        known = [isinstance(goal.model, KnownSum) for goal in goals]
        if sorted(known) == [False, True]:
            uncertain = known.index(False)
            score, other = goals[uncertain], goals[1 - uncertain]
            corner = float(score.values.min()), float(other.values.min())
            expected, sums = (goal.model.predict(allowed)[0] for goal in (score, other))
            return hypervolume_improvement(expected, sums, corner, uncertain=uncertain)
        weights = rng.dirichlet(np.ones(len(goals)))
        return scalarisation([goal.values for goal in goals], weights, _HOPE)

    def _goal(
        self,
        problem: Encoding,
        study: Study,
        index: int,
        plans: Plans,
        done: Sequence[FrozenTrial],
        waiting: Plans,
    ) -> Goal:
        sign = -1.0 if study.directions[index] == StudyDirection.MINIMIZE else 1.0
        if index in self._costs:
            known = KnownSum(sign * problem.table(self._costs[index]))
            # Not what trials returned, which may hold what no parameter changes.
            return Goal(known.predict(plans)[0], known)
        complete = np.array([t.state == TrialState.COMPLETE for t in done])
        values = np.array(
            [sign * t.values[index] if whole else 0.0 for t, whole in zip(done, complete, strict=True)]
        )
        infeasible = np.array([not _allowed(trial) for trial in done])
        # As bad as the worst: the process learns to stay away, whatever such a plan scored.
        finite = complete & (np.abs(values) <= _LARGEST)
        if finite.any():
            values[finite] = without_outliers(values[finite])
        worst = values[finite].min() if finite.any() else 0.0
        values = np.where(infeasible | ~finite, worst, values)
        prior = sign * problem.table(self._prior) if self._prior is not None and index == 0 else None
        return Goal(values, _fitted(problem.space, plans, values, prior, waiting))


def _fitted(
    space: Space, plans: Plans, values: Floats, prior: Floats | None, waiting: Plans
) -> PlanSurrogate:
    surrogate = PlanSurrogate(space, plans, values, prior)
    if not len(waiting):
        return surrogate
    believed, _ = surrogate.predict(waiting)
    return PlanSurrogate(
        space, np.concatenate([plans, waiting]), np.concatenate([values, believed]), prior, like=surrogate
    )


def _allowed(trial: FrozenTrial) -> bool:
    complete = trial.state == TrialState.COMPLETE
    return complete and all(value <= 0 for value in trial.constraints.values())


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that were given when the trial was enqueued."""
    given: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
    return given


def _trials(study: Study, *states: TrialState) -> list[FrozenTrial]:
    # As Optuna's own samplers do: one read per trial, however often they are asked for.
    return study._get_trials(deepcopy=False, states=states, use_cache=True)


def _shared(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Return the parameters that all of some trials have suggested."""
    several = [trial.distributions for trial in trials if trial.distributions]
    first = several[0] if several else {}
    return {name: one for name, one in first.items() if all(other.get(name) == one for other in several)}
