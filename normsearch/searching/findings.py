"""Findings: what is known of a search, in the words of its report."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from normsearch.errors import SearchError
from normsearch.plans import Plan
from normsearch.reporting.search_sections import Goal
from normsearch.searching.concluding import concluded
from normsearch.searching.confirming import Confirmed, candidates, feasible
from normsearch.searching.leases import ERROR
from normsearch.searching.posterior import Effect, Posterior
from normsearch.searching.resident import Resident
from normsearch.searching.results import SearchResult
from normsearch.searching.space import SearchSpace
from normsearch.searching.stepwise import Search
from normsearch.searching.storage import refuse_missing
from normsearch.searching.studies import Memory, Settings, opened_study
from normsearch.searching.trials import counted_trials
from normsearch.sensitivities import Sensitivity

_STATES = {
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_ORIGINS = ("uniform", "prior", "learned")


@dataclass(frozen=True)
class Findings:
    """What a report is made from.

    Attributes:
        study: Optuna's.
        space: what was searched.
        model: the network, for device and dtype.
        score: what the first number is called.
        best: number of the trial whose plan counts, returned or leading; None as long as none is complete.
        reference: number of the best uniform plan's trial.
        confirmed: the confirmation, by trial; empty where there is none.
        same_split: whether it used the data of the search.
        sensitivity: drift of single changes.

    """

    study: Study
    space: SearchSpace
    model: nn.Module
    score: str
    best: int | None
    reference: int | None
    confirmed: Mapping[int, Confirmed]
    same_split: bool
    sensitivity: Sensitivity | None

    @classmethod
    def of(cls, found: SearchResult | Search, score: str) -> Findings:
        """Return what is known of a search, finished or not."""
        if isinstance(found, SearchResult):
            return cls(
                found.study,
                found.space,
                found.model,
                score,
                found.candidates[found.chosen].number,
                next((one.number for one in found.candidates if one.uniform is not None), None),
                {row.number: row for row in found.confirmation},
                found.same_split,
                found.sensitivity,
            )
        if not isinstance(found, Search):
            raise SearchError(
                f"a report is of what search returned, or of a Search, not of a {type(found).__name__}; of a "
                "study alone, Findings.of_study(model, name=, storage=)"
            )
        return cls._remembered(found.study, found.space, found.resident.model, score)

    @classmethod
    def of_study(
        cls,
        model: nn.Module,
        *,
        name: str,
        storage: str | os.PathLike[str] | BaseStorage,
        score: str = "score",
    ) -> Findings:
        """Return what is known of a search that goes on elsewhere, or was interrupted; nothing is run.

        Args:
            model: the model that is searched.
            name: of the study.
            storage: as for ``search``.
            score: what the first number is called.

        Raises:
            SearchError: there is no such study, it searches another model, or has not begun its trials.

        """
        refuse_missing(storage)
        study = opened_study(name, storage)
        memory = Memory(study)
        if not memory.has("ready"):
            raise SearchError(f"the study {name!r} has not begun its trials; look again later")
        inside = Resident(model).model
        return cls._remembered(study, memory.space(inside), inside, score)

    @classmethod
    def _remembered(cls, study: Study, space: SearchSpace, model: nn.Module, score: str) -> Findings:
        """Return what a study knows: how the search ended, or which plan leads as long as it has not."""
        memory = Memory(study)
        ended = concluded(memory)
        if ended is not None:
            rows = {row.number: row for row in ended.rows}
            known = (ended.trial, ended.reference, rows, ended.same_split, memory.sensitivity())
            return cls(study, space, model, score, *known)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = reference = None
        if any(map(feasible, done)):
            leading = candidates(study, space, 1, memory.prior())
            reference = next((one.number for one in leading if one.uniform is not None), None)
            sign = -1.0 if study.directions[0] == StudyDirection.MINIMIZE else 1.0
            best = max(leading, key=lambda one: sign * one.value).number
        return cls(study, space, model, score, best, reference, {}, False, memory.sensitivity())

    @cached_property
    def memory(self) -> Memory:
        """What the study remembers."""
        return Memory(self.study)

    @cached_property
    def settings(self) -> Settings:
        """The search's arguments."""
        return self.memory.settings()

    @cached_property
    def wanted(self) -> int:
        """The number of trials that were asked for."""
        return int(self.memory.read("n_trials"))

    @cached_property
    def counted(self) -> list[FrozenTrial]:
        """The trials that count, by number; those that wait beyond what was asked for do not."""
        trials = enumerate(counted_trials(self.study.get_trials(deepcopy=False)))
        return [one for place, one in trials if place < self.wanted or one.state != TrialState.WAITING]

    @cached_property
    def by_number(self) -> Mapping[int, FrozenTrial]:
        """The same, by number."""
        return {trial.number: trial for trial in self.counted}

    @cached_property
    def uniform(self) -> Mapping[int, str]:
        """The method of every trial whose plan is uniform."""
        plans = {tuple(sorted(self.space.uniform(m).items())): m for m in reversed(self.space.methods)}
        keys = {trial.number: self._plan_key(trial) for trial in self.counted}
        return {number: plans[key] for number, key in keys.items() if key in plans}

    @cached_property
    def goals(self) -> tuple[Goal, ...]:
        """The numbers of a trial."""
        directions = self.settings.directions
        names = [self.score, *(f"objective {n}" for n in range(2, len(directions) + 1))]
        own = [Goal(name=n, maximize=d == "maximize") for n, d in zip(names, directions, strict=True)]
        return (*own, *(Goal(name=cost, maximize=False) for cost in self.settings.costs))

    @cached_property
    def best_plan(self) -> Plan:
        """The plan that counts."""
        assert self.best is not None
        return self.space.plan(self.by_number[self.best].params)

    @cached_property
    def further(self) -> Mapping[str, Any]:
        """What else the objective suggested in the trial of the plan that counts."""
        params = {} if self.best is None else self.by_number[self.best].params
        return {name: value for name, value in params.items() if name not in self.space.distributions}

    @cached_property
    def expected(self) -> Mapping[str, Mapping[str, Effect]]:
        """The posterior's effects on the plan; empty where there is too little to say.

        Where all scores are the same, or too large to compute with, there is nothing but the prior.
        """
        done = [trial for trial in self.counted if trial.state == TrialState.COMPLETE]
        if self.scored < 2 or self.best is None:
            return {}
        sign = 1.0 if self.goals[0].maximize else -1.0
        posterior = Posterior(
            self.space, done, [sign * trial.values[0] for trial in done], self.memory.prior()
        )
        effects = posterior.effects(self.by_number[self.best].params)
        cells = [cell for row in effects.values() for cell in row.values()]
        finite = all(math.isfinite(cell.mean) and math.isfinite(cell.deviation) for cell in cells)
        return effects if finite else {}

    @cached_property
    def scored(self) -> int:
        """How many different scores trials have."""
        return len({trial.values[0] for trial in self.counted if trial.state == TrialState.COMPLETE})

    def place(self, path: str) -> int | None:
        """Return the place of the method that the plan that counts has at a site."""
        if self.best is None:
            return None
        params = self.by_number[self.best].params
        allowed = self.space.allowed[path]
        for choice in self.space.choices:
            if path in choice.sites:
                spelling = params.get(choice.name, choice.methods[0])
                return self.space.methods.index(spelling if spelling in allowed else allowed[0])
        return None

    def name(self, number: int) -> str:
        """Return what a trial's plan is called."""
        return f"all {self.uniform[number]}" if number in self.uniform else f"trial {number}"

    def origin(self, trial: FrozenTrial) -> str:
        """Return why a trial's plan was tried."""
        origin = trial.user_attrs.get("origin")
        return origin if origin in _ORIGINS else "sampler"

    def _plan_key(self, trial: FrozenTrial) -> tuple[tuple[str, str], ...] | None:
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        try:
            return tuple(sorted(self.space.free(params).items()))
        except KeyError:
            # A trial that was given up before its parameters were suggested.
            return None


def state(trial: FrozenTrial) -> str:
    """Return what became of a trial, as a report says it."""
    if trial.state == TrialState.COMPLETE:
        return "complete" if feasible(trial) else "infeasible"
    return _STATES[trial.state]


def reason(trial: FrozenTrial) -> str | None:
    """Return why a trial does not count; None where it does."""
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get(ERROR, "no reason is known"))
    over = [f"{name} by {value:.3g}" for name, value in trial.constraints.items() if value > 0]
    return f"misses {', '.join(over)}" if over else None
