"""Trials that are asked for by hand: this process holds their leases until it tells what came of them."""

from __future__ import annotations

import weakref
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from normsearch.errors import SearchError
from normsearch.searching.leases import HeldLease, Leases, LeaseTerms

_TERMS = LeaseTerms()


class AskedTrials:
    """The trials of a study that this process has and runs by hand.

    Other workers leave them alone for as long as this object is there.

    Args:
        study: Optuna's.

    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._leases = Leases(study._storage, _TERMS)
        self._held: dict[int, HeldLease] = {}
        weakref.finalize(self, _end, self._held).atexit = False

    def hold(self, trial: Trial) -> Trial:
        """Take the lease on a running trial, and renew it from now on."""
        self._held[trial._trial_id] = self._leases.hold(trial._trial_id).__enter__()
        return trial

    def reclaim(self) -> None:
        """Let trials wait again whose processes are gone."""
        self._leases.reclaim(self._study.get_trials(deepcopy=False))

    def resume(self, number: int) -> Trial:
        """Return a trial that runs, or waits, by its number, and take its lease.

        Raises:
            SearchError: there is no such trial, it is finished, or another worker took it just now.

        """
        stored = self._stored(number)
        if stored is None:
            raise SearchError(f"the study has no trial {number}; ask for one")
        self._check_unfinished(stored)
        if stored.state == TrialState.WAITING and not self._begin(stored):
            raise SearchError(f"trial {number} is another worker's now; ask for another one")
        return self.hold(Trial(self._study, stored._trial_id))

    def check(self, trial: Any) -> None:
        """Raise unless something is a trial of this study that is still to be told.

        Raises:
            SearchError: it is none, of another study, finished, or another worker's.

        """
        if not isinstance(trial, Trial):
            raise SearchError(f"trial={trial!r}: give a trial that ask returned")
        stored = self._stored(trial.number)
        if trial.study.study_name != self._study.study_name or stored is None:
            raise SearchError(f"trial {trial.number} of {trial.study.study_name!r} is not of this search")
        self._check_unfinished(stored)
        lease = self._held.get(stored._trial_id)
        same = stored.datetime_start == trial.datetime_start
        if not same or (lease is not None and not lease.covers(stored)):
            raise SearchError(
                f"trial {trial.number} is another's by now: another search's, or a worker's that took it "
                "over; ask for another one"
            )

    def end(self, trial: Trial) -> None:
        """Let go of a trial that was told."""
        lease = self._held.pop(trial._trial_id, None)
        if lease is not None:
            lease.end()

    def give_back(self) -> None:
        """Let every trial that was not told wait for whoever goes on."""
        while self._held:
            self._held.popitem()[1].give_back()

    def _begin(self, stored: FrozenTrial) -> bool:
        try:
            return self._study._storage.set_trial_state_values(stored._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _stored(self, number: int) -> FrozenTrial | None:
        trials = self._study._storage.get_all_trials(self._study._study_id, deepcopy=False)
        return next((one for one in trials if one.number == number), None)

    def _check_unfinished(self, stored: FrozenTrial) -> None:
        if stored.state.is_finished():
            state = stored.state.name.lower()
            raise SearchError(f"trial {stored.number} is finished already ({state}); ask for another one")


def _end(held: dict[int, HeldLease]) -> None:
    for lease in held.values():
        lease.end()
