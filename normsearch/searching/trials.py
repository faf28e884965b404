"""Trials: the loop of one worker, alone or beside others on the same study."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial

from optuna.distributions import BaseDistribution
from optuna.exceptions import OptunaError, StorageInternalError, TrialPruned, UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from normsearch.errors import NormsearchError, SearchError
from normsearch.searching.leases import ERROR, HeldLease, Leases, LeaseTerms, persistently
from normsearch.searching.outcomes import LONGEST_ERROR, Failures, Outcome, checked, failed

#: The system attribute of trials that two workers made where one was left; they do not count.
_SURPLUS = "normsearch:surplus"
#: Seconds between two looks at a study whose last trials others are running.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25


def run_trials(
    study: Study,
    evaluate: Callable[[Trial], float | Sequence[float]],
    *,
    n_trials: int,
    distributions: Mapping[str, BaseDistribution],
    on_trial: Callable[[FrozenTrial], None] | None = None,
    terms: LeaseTerms | None = None,
) -> None:
    """Run trials until a study has ``n_trials`` that are finished: complete, pruned or failed.

    Any number of processes may do so on one study: together they finish exactly ``n_trials``, those that are
    in it already and those that wait in it included. A trial runs at least once and is counted once: one
    whose process is killed is run again by another, with the same parameters (see
    ``normsearch.searching.leases``), and one that is interrupted (KeyboardInterrupt, SystemExit) waits until
    somebody goes on. So what ``evaluate`` does beside returning a value must bear being repeated.

    A trial whose evaluation raises, or whose values are not finite numbers, fails with the reason in its user
    attribute ``error``, and the loop goes on. One process makes the same trials with and without an
    interruption, if its sampler depends on nothing but its seed and the study, as ``NormSampler`` does.

    Args:
        study: an Optuna study.
        evaluate: returns a trial's value, or as many as the study has directions.
        n_trials: how many the study shall have in the end.
        distributions: what is suggested before each evaluation.
        on_trial: called with each trial that this process has finished.
        terms: when a process counts as gone; all processes of a study should have the same.

    Raises:
        SearchError: ``n_trials`` is no positive number, or the first three evaluations fail in the same way.

    Example:
        >>> import optuna
        >>> from optuna.distributions import CategoricalDistribution
        >>> from normsearch.searching import NormSampler, run_trials
        >>> study = optuna.create_study(sampler=NormSampler())
        >>> methods = CategoricalDistribution(["batch", "group"])
        >>> run_trials(
        ...     study,
        ...     lambda trial: float(trial.params["bn1"] == "batch"),
        ...     n_trials=3,
        ...     distributions={"bn1": methods},
        ... )
        >>> len(study.trials), study.best_params
        (3, {'bn1': 'group'})

    """
    if not isinstance(n_trials, int) or isinstance(n_trials, bool) or n_trials < 1:
        raise SearchError(f"n_trials={n_trials!r}: give a whole number, at least 1")
    worker = _Worker(study, n_trials, dict(distributions), terms or LeaseTerms())
    failures = Failures()
    while (trial_id := worker.next()) is not None:
        outcome = worker.run(trial_id, evaluate)
        if outcome is None:
            continue
        if on_trial is not None:
            on_trial(deepcopy(study._storage.get_trial(trial_id)))
        try:
            failures.add(outcome)
        except SearchError:
            _try_again(study)
            raise


def _try_again(study: Study) -> None:
    """Let the plans that failed wait for a mended objective: often those that a search starts with."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.FAIL and trial.params:
            study.enqueue_trial(dict(trial.params), user_attrs={"origin": trial.user_attrs.get("origin")})


def counted_trials(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that count, by number: all but those that two workers made where one was left."""
    return sorted((t for t in trials if _SURPLUS not in t.system_attrs), key=lambda trial: trial.number)


def finished_trials(study: Study) -> int:
    """Return how many trials that count are complete, pruned or failed."""
    return sum(trial.state.is_finished() for trial in counted_trials(study.get_trials(deepcopy=False)))


@contextmanager
def proposing(study: Study) -> Iterator[None]:
    """Name the sampler in what it raises while it proposes a trial.

    Raises:
        SearchError: the sampler failed otherwise than by the storage, which may be asked again.

    """
    try:
        yield
    except (NormsearchError, OptunaError, OSError):
        raise
    except Exception as error:
        raise SearchError(
            f"the sampler {type(study.sampler).__name__} cannot propose a plan ({type(error).__name__}: "
            f"{error}); give one that takes categoricals of any name, or leave sampler= out"
        ) from error


class _Worker:
    """One process's part in a study."""

    def __init__(
        self, study: Study, n_trials: int, distributions: dict[str, BaseDistribution], terms: LeaseTerms
    ) -> None:
        self._study, self._n_trials, self._distributions = study, n_trials, distributions
        self._storage, self._terms = study._storage, terms
        self._leases = Leases(self._storage, terms)

    def next(self) -> int | None:
        """Return a trial to run, made or taken, or None when enough are finished; wait for others' last."""
        pause = _SHORTEST_PAUSE
        while True:
            trials = persistently(self._look, self._terms)
            if trials is None:
                return None
            trial_id = persistently(partial(self._take, trials), self._terms)
            if trial_id is not None:
                return trial_id
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _look(self) -> list[FrozenTrial] | None:
        """Give back the trials of dead workers; return those within the budget, None if all are finished."""
        trials = self._trials()
        if self._leases.reclaim(trials):
            trials = self._trials()
        budget = counted_trials(trials)[: self._n_trials]
        done = len(budget) == self._n_trials and all(trial.state.is_finished() for trial in budget)
        return None if done else budget

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False)

    def _take(self, budget: list[FrozenTrial]) -> int | None:
        for trial in budget:
            if trial.state == TrialState.WAITING and self._pop(trial._trial_id):
                return trial._trial_id
        return self._create() if len(budget) < self._n_trials else None

    def _pop(self, trial_id: int) -> bool:
        try:
            return self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _create(self) -> int:
        template = create_trial(state=TrialState.RUNNING, system_attrs=self._leases.first())
        return self._storage.create_new_trial(self._study._study_id, template)

    def _is_surplus(self, trial: Trial) -> bool:
        """Say whether others were faster and the budget was full: the lowest numbers count."""
        if trial.number < self._n_trials:
            return False
        counted = [one.number for one in counted_trials(self._trials())]
        return trial.number not in counted[: self._n_trials]

    def _drop(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_system_attr(trial_id, _SURPLUS, True)
            message = f"not needed: the study has its {self._n_trials} trials"
            self._storage.set_trial_user_attr(trial_id, ERROR, message)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def run(self, trial_id: int, evaluate: Callable[[Trial], float | Sequence[float]]) -> Outcome | None:
        """Run a trial and tell what came out; None if it is another worker's now."""
        try:
            with self._leases.hold(trial_id) as lease:
                return self._run(trial_id, evaluate, lease)
        except UpdateFinishedTrialError:
            return None

    def _run(
        self, trial_id: int, evaluate: Callable[[Trial], float | Sequence[float]], lease: HeldLease
    ) -> Outcome | None:
        try:
            trial = persistently(partial(self._ask, trial_id, lease), self._terms)
            if trial is None:
                persistently(partial(self._drop, trial_id), self._terms)
                return None
            outcome = self._evaluated(trial, evaluate)
            told = persistently(partial(self._tell, trial, outcome, lease), self._terms)
            return outcome if told else None
        except BaseException as error:
            if isinstance(error, Exception) and not persistently(lease.is_held, self._terms):
                return None
            lease.give_back()
            raise

    def _ask(self, trial_id: int, lease: HeldLease) -> Trial | None:
        """Return the trial with its parameters, or None if it is one too many.

        This is ``Study.ask``, but of a trial that is leased already.

        Raises:
            UpdateFinishedTrialError: it is another worker's now.

        """
        while True:
            # The sampler shall see the trials of now.
            self._study._thread_local.cached_all_trials = None
            with proposing(self._study):
                trial = Trial(self._study, trial_id)
                if self._is_surplus(trial):
                    return None
                for name, distribution in self._distributions.items():
                    # Parameters must not be written over those with which another worker runs it by now.
                    if not lease.is_fresh():
                        raise UpdateFinishedTrialError(f"trial {trial.number} was taken over")
                    trial._suggest(name, distribution)
            # Of a new trial, nobody else has written any.
            if not lease.is_second_hand() or self._storage.get_trial(trial_id).params == trial.params:
                return trial

    def _evaluated(self, trial: Trial, evaluate: Callable[[Trial], float | Sequence[float]]) -> Outcome:
        try:
            returned = evaluate(trial)
        except TrialPruned as given_up:
            return Outcome(TrialState.PRUNED, error=str(given_up)[:LONGEST_ERROR])
        except (StorageInternalError, UpdateFinishedTrialError):
            # The storage's failure, or another worker's success; not the objective's failure.
            raise
        except Exception as error:
            return failed(f"{type(error).__name__}: {error}", error)
        return checked(returned, len(self._study.directions))

    def _tell(self, trial: Trial, outcome: Outcome, lease: HeldLease) -> bool:
        """Finish a trial; say whether it was this worker's to finish."""
        stored = self._storage.get_trial(trial._trial_id)
        if not lease.covers(stored):
            return False
        if not self._keeps_parameters(trial, stored):
            lease.give_back()
            return False
        try:
            if outcome.error:
                trial.set_user_attr(ERROR, outcome.error)
            self._study.tell(trial, outcome.values, outcome.state)
        except (UpdateFinishedTrialError, ValueError):
            if lease.is_held():
                raise
            return False
        return True

    def _keeps_parameters(self, trial: Trial, stored: FrozenTrial) -> bool:
        """Say whether a trial still has the parameters that were evaluated, and restore them if possible.

        Another worker, thought dead while it proposed them, may have come back and written one of its own.
        """
        if stored.params == trial.params:
            return True
        for name, distribution in trial.distributions.items():
            internal = distribution.to_internal_repr(trial.params[name])
            self._storage.set_trial_param(trial._trial_id, name, internal, distribution)
        return self._storage.get_trial(trial._trial_id).params == trial.params
