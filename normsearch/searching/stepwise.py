"""Search: a search that is driven by hand, one trial after the other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn

from normsearch.errors import SearchError
from normsearch.methods import Method
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Progress
from normsearch.searching.asking import AskedTrials
from normsearch.searching.checking import (
    LARGEST_SEED,
    check_arguments,
    check_callback,
    check_inputs,
    check_model,
    check_objective,
    check_whole,
)
from normsearch.searching.concluding import Conclusion, forget_failures
from normsearch.searching.confirming import Candidate
from normsearch.searching.constraints import CEILINGS, Constraint, checked
from normsearch.searching.costs import check_cost
from normsearch.searching.identity import identity
from normsearch.searching.objectives import Objective, direction_names
from normsearch.searching.preparing import NO_INPUTS, VETO, prepare
from normsearch.searching.resident import Resident
from normsearch.searching.results import SearchResult
from normsearch.searching.samplers import check_sampler, sampler_named
from normsearch.searching.space import METHODS, SearchSpace
from normsearch.searching.studies import Memory, Settings, made_study
from normsearch.searching.tasks import Task
from normsearch.searching.trials import proposing
from normsearch.searching.workers import evaluation, work
from normsearch.sensitivities import Sensitivity

#: So many sites are named in a message.
_NAMED = 5


class Search:
    """A search that can be driven by hand: what ``search`` does, step by step.

    Making one prepares the study: space, costs, veto, ties, prior and first plans, each once for all workers
    and resumptions. Then ``optimize``, or ``ask`` for a trial, take its ``plan`` (or ``evaluate`` it) and
    ``tell`` what it scored; at the end ``result``.

    Args: as for ``search``.

    Example:
        >>> import torch
        >>> from normsearch.searching import Search
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> run = Search(model, None, methods=["batch", "group"], n_trials=4)
        >>> trial = run.ask()
        >>> plan = run.plan(trial)
        >>> run.tell(trial, 0.5)

    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Task | None,
        *,
        methods: Sequence[str | Method] = METHODS,
        sites: Iterable[str] | None = None,
        directions: Sequence[str] = ("maximize",),
        costs: Sequence[str] = (),
        constraints: Sequence[Constraint] = (),
        n_trials: int = 100,
        storage: str | os.PathLike[str] | BaseStorage | None = None,
        name: str | None = None,
        sampler: str | BaseSampler = "auto",
        seed: int = 0,
        inputs: Iterable[Any] | None = None,
        veto: float | None = VETO,
        sense: bool = True,
        on_progress: OnProgress | None = None,
    ) -> None:
        n_trials = check_whole("n_trials", n_trials, 1)
        seed = check_whole("seed", seed, 0, LARGEST_SEED)
        sites = (
            sites if sites is None or isinstance(sites, str) or not isinstance(sites, Iterable) else [*sites]
        )
        check_arguments(methods, sites, directions, costs, constraints, storage, name, sampler, veto)
        check_callback(on_progress)
        check_inputs(inputs)
        check_model(model)
        check_objective(objective)
        costs = (costs,) if isinstance(costs, str) else costs
        self.n_trials = n_trials
        for cost in costs:
            check_cost(cost)
        if isinstance(sampler, str):
            check_sampler(sampler)
        self._objective = objective
        given = objective.inputs() if inputs is None and isinstance(objective, Task) else inputs
        if isinstance(objective, Task) and len(direction_names(directions)) != 1:
            raise SearchError(
                f"a Task returns one number, its metric, and directions={directions!r} are "
                f"{len(direction_names(directions))}; give one, and what plans cost with costs=, or an "
                "objective of your own"
            )
        if given is None and (costs or any(type(c) in CEILINGS for c in checked(constraints))):
            # Said before a study is made, which keeps its directions.
            raise SearchError(NO_INPUTS)
        named = sampler if isinstance(sampler, str) else type(sampler).__name__
        settings = Settings(
            methods=tuple(str(m) for m in ([methods] if isinstance(methods, str | Method) else methods)),
            sites=None if sites is None else tuple([sites] if isinstance(sites, str) else sites),
            directions=direction_names(directions),
            costs=tuple(costs),
            constraints=tuple((type(c).__name__, asdict(c)) for c in checked(constraints)),
            sampler=named,
            seed=seed,
            veto=veto,
            sense=bool(sense) and isinstance(objective, Task),
        )
        self.resident = Resident(model)
        self.study = made_study(settings, storage, name)
        self.memory = Memory(self.study)
        self.memory.keep_settings(settings)
        self.memory.keep_identity(identity(self.resident, objective))
        prepare(self.resident, self.memory, objective, given, n_trials, on_progress)
        self.space = self.memory.space(self.resident.model)
        self.memory.keep("n_trials", min(self.n_trials, self.space.size))
        known = [spared(self.memory, self.space)]
        if self.space.size < self.n_trials:
            known.append(
                f"{self.space.size} different plans are left without what is refused, vetoed or tied"
            )
        for text in filter(None, known):
            if on_progress is not None:
                on_progress(Progress("searching", 0, min(self.n_trials, self.space.size), None, text))
        if not isinstance(sampler, BaseSampler):
            sampler = sampler_named(sampler, self.memory, self.space)
        self.study.sampler = sampler
        self._asked = AskedTrials(self.study)
        self._evaluation = evaluation(self.resident, self.space, objective, self.memory)

    @property
    def sensitivity(self) -> Sensitivity | None:
        """Drift of single changes; None without inputs."""
        return self.memory.sensitivity()

    def ask(self) -> Trial:
        """Return the next trial, its parameters suggested.

        It is left to this process until it is told, however long that takes: other workers do not run it.

        Raises:
            SearchError: all trials are taken, or a sampler of the caller's cannot propose one.

        """
        self._asked.reclaim()
        trials = self.study.get_trials(deepcopy=False)
        if sum(trial.state != TrialState.WAITING for trial in trials) >= self.n_trials:
            raise SearchError(f"all {self.n_trials} trials were asked for; give a larger n_trials")
        with proposing(self.study):
            trial = self.study.ask(dict(self.space.distributions))
        return self._asked.hold(trial)

    def plan(self, trial: Trial | FrozenTrial) -> Plan:
        """Return a trial's plan.

        Raises:
            SearchError: it is no trial of this search.

        """
        if not isinstance(trial, Trial | FrozenTrial):
            raise SearchError(f"trial={trial!r}: give a trial that ask returned")
        return self.space.plan(trial.params)

    def tell(self, trial: Trial, values: float | Sequence[float] | None) -> None:
        """Record a trial's numbers, costs that are objectives added, or that it failed.

        Args:
            trial: what ``ask`` or ``resume`` returned.
            values: a number, or one for each direction, or what ``evaluate`` returned; None for a trial that
                failed, whose user attribute ``error`` may say why, or that is above a ceiling.

        Raises:
            SearchError: they are not finite, or not one for each direction, and the trial can be told again;
                or it is no trial of this search, is finished, or is another worker's.

        """
        self._asked.check(trial)
        if values is None:
            over = self._evaluation.judged(trial)
            self.study.tell(trial, state=TrialState.PRUNED if over else TrialState.FAIL)
        else:
            numbers = self._evaluation.with_costs(trial, values)
            self._evaluation.judged(trial, numbers[0])
            self.study.tell(trial, numbers)
        self._asked.end(trial)

    def optimize(self, *, on_progress: OnProgress | None = None) -> None:
        """Run trials until there are ``n_trials``; other workers' count.

        Those that were asked for and not told are run too.

        Raises:
            SearchError: the objective fails again and again.

        """
        if self._objective is None:
            raise SearchError("this search has no objective to run; ask and tell by hand, or give one")
        self._asked.give_back()
        work(self.study, self._evaluation, self.memory.read("n_trials"), on_progress=on_progress)
        names = set(self.space.distributions)
        if self.n_trials > self.space.size and any(set(t.params) - names for t in self.study.get_trials()):
            # The objective suggests more than the plan: another run of one is no repetition.
            self.memory.keep("n_trials", self.n_trials)
            work(self.study, self._evaluation, self.n_trials, on_progress=on_progress)

    def resume(self, number: int) -> Trial:
        """Return an unfinished trial by its number, its parameters suggested unless they were before.

        It is this process's from now on, whoever had it.

        Raises:
            SearchError: there is no such trial, or it is finished.

        """
        trial = self._asked.resume(number)
        for name, distribution in self.space.distributions.items():
            trial.suggest_categorical(name, distribution.choices)
        return trial

    def evaluate(self, trial: Trial) -> tuple[float, ...]:
        """Convert, run the objective on a trial's plan and return its numbers with costs; it is not told.

        Raises:
            optuna.TrialPruned: a known cost is above what a constraint allows.
            SearchError: the objective returned something else than finite numbers.

        """
        return self._evaluation.trial(self.study, trial)

    def unconfirmed(self, *, confirm: int = 5, top: int = 3) -> list[tuple[Candidate, int]]:
        """Return which plans are still to be run again before ``result``, each with its seed.

        A plan that failed is left out, and the next best takes its place.

        Raises:
            SearchError: no trial meets the constraints, or no plan is left that has not failed.

        """
        return self._conclusion.unconfirmed(confirm, top)

    def confirm(self, candidate: Candidate, seed: int) -> float:
        """Run a plan again under a seed, on data that no trial saw if the objective has some; keep the score.

        Raises:
            SearchError: it fails, or has failed. That is kept: the plan is out until ``forget_failures``.

        """
        return self._conclusion.confirm(candidate, seed)

    def result(
        self, *, confirm: int = 5, top: int = 3, on_progress: OnProgress | None = None
    ) -> SearchResult:
        """Confirm the best plans and return the one to use, trained.

        A plan that fails when it is run again is out, and the next best takes its place; a seed with which
        every plan fails gives way to another one.

        Raises:
            SearchError: no trial meets the constraints, every plan fails, or there is nothing to run.

        """
        confirm, top = check_whole("confirm", confirm, 0), check_whole("top", top, 1)
        check_callback(on_progress)
        if self._objective is None:
            raise SearchError("this search has no objective to confirm by; see study.best_trials instead")
        return self._conclusion.result(confirm, top, on_progress)

    def forget_failures(self) -> None:
        """Let plans and seeds that failed in the confirmation have another go, as ``search`` does."""
        forget_failures(self.memory)

    @property
    def _conclusion(self) -> Conclusion:
        return Conclusion(self.study, self.memory, self.space, self._evaluation, self._objective)


def spared(memory: Memory, space: SearchSpace) -> str:
    """Return at which sites nothing is vetoed because nothing would be left; empty where there are none."""
    drift, veto = memory.sensitivity(), memory.settings().veto
    if drift is None or veto is None:
        return ""
    vetoes = drift.vetoes(veto)
    sites = [path for path, left in space.allowed.items() if set(left) <= {*vetoes.get(path, ())} - {"batch"}]
    if not sites:
        return ""
    named = ", ".join(map(repr, sites[:_NAMED])) + (
        f" and {len(sites) - _NAMED} more" if sites[_NAMED:] else ""
    )
    return (
        f"at {named} every method moves the output by more than {veto:g} alone, so that none is vetoed "
        "there; add methods that change less, or leave such sites out"
    )
