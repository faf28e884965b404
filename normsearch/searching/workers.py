"""Workers: run the trials of a study, alone or beside others."""

from __future__ import annotations

import os
import time
from typing import Any

from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from normsearch.errors import SearchError
from normsearch.progress import OnProgress, Stage
from normsearch.searching.checking import check_callback, check_model, check_objective
from normsearch.searching.identity import identity
from normsearch.searching.leases import LeaseTerms
from normsearch.searching.objectives import Evaluation, Objective
from normsearch.searching.resident import Resident
from normsearch.searching.space import SearchSpace
from normsearch.searching.storage import check_shared, open_storage, refuse_missing
from normsearch.searching.studies import Memory, check_own, opened_study
from normsearch.searching.tasks import Task
from normsearch.searching.trials import counted_trials, run_trials

#: Seconds between two looks at a study that is being prepared.
_PAUSE = 0.5
#: For so many seconds a search may have made its study and not said yet that it is one.
_GRACE = 10.0


def evaluation(
    resident: Resident, space: SearchSpace, objective: Objective | Task | None, memory: Memory
) -> Evaluation:
    """Return what a study's trials need."""
    settings = memory.settings()
    return Evaluation(
        resident=resident,
        space=space,
        objective=objective or _no_objective,
        directions=settings.directions,
        costs=settings.costs,
        table=memory.costs(),
        constraints=settings.built_constraints(),
        reference=memory.read("reference"),
        seed=settings.seed,
    )


def work(
    study: Study,
    trials: Evaluation,
    n_trials: int,
    *,
    terms: LeaseTerms | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Run trials until the study has ``n_trials``.

    Raises:
        SearchError: the objective fails again and again.

    """

    def finished() -> int:
        trials = counted_trials(study.get_trials(deepcopy=False))
        return sum(t.state.is_finished() for t in trials[:n_trials])

    stage = Stage("searching", n_trials, on_progress, done=finished())
    run_trials(
        study,
        lambda trial: trials.trial(study, trial),
        n_trials=n_trials,
        distributions=trials.space.distributions,
        on_trial=lambda trial: stage.advance(_said(study, trial), done=finished()),
        terms=terms,
    )


def join(
    model: nn.Module,
    objective: Objective | Task,
    *,
    name: str,
    storage: str | os.PathLike[str] | BaseStorage,
    terms: LeaseTerms | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Run trials of a search that was started elsewhere, until it has all it asked for.

    While that one is still preparing its first trial, this one waits.

    The model and the objective come from the caller, never from the study: everybody who may write to a
    shared database could put anything there. What is read from it is validated.

    Args:
        model: the model that is searched.
        objective: the same as the search's.
        name: of the study.
        storage: as for ``search``; not in memory, and no SQLite.
        terms: when a process counts as gone.
        on_progress: called after every trial of this process.

    Raises:
        SearchError: there is no such study, it searches another model, or the storage cannot be shared.

    """
    check_model(model)
    check_objective(objective)
    check_callback(on_progress)
    refuse_missing(storage)
    opened = open_storage(storage)
    check_shared(opened)
    study = opened_study(name, opened)
    memory = Memory(study)
    resident = Resident(model)
    _await(memory, on_progress)
    space = memory.space(resident.model)
    memory.keep_identity(identity(resident, objective))
    # Imported here: samplers read what workers keep.
    from normsearch.searching.samplers import sampler_named

    study.sampler = sampler_named(memory.settings().sampler, memory, space)
    run = evaluation(resident, space, objective, memory)
    work(study, run, memory.read("n_trials"), terms=terms, on_progress=on_progress)


def _await(memory: Memory, on_progress: OnProgress | None) -> None:
    """Return when trials may begin.

    Raises:
        SearchError: the study is no search, or does not become one.

    """
    if not memory.has("ready"):
        Stage("waiting for the search to begin its trials", 0, on_progress)
    end = time.monotonic() + _GRACE
    while not memory.has("ready"):
        check_own(memory.study)
        if not memory.has("settings") and time.monotonic() > end:
            raise SearchError(
                f"the study {memory.study.study_name!r} is empty: no search has begun there; start it first"
            )
        time.sleep(_PAUSE)


def _said(study: Study, trial: FrozenTrial) -> str:
    if trial.state != TrialState.COMPLETE:
        return f"trial {trial.number} {trial.state.name.lower()}"
    text = f"trial {trial.number}: {', '.join(f'{value:.4g}' for value in trial.values)}"
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = [t.values[0] for t in done if all(v <= 0 for v in t.constraints.values())]
    if not values:
        return text
    best = min(values) if study.directions[0] == StudyDirection.MINIMIZE else max(values)
    return f"{text}; best {best:.4g}"


def _no_objective(model: nn.Module, trial: Any) -> float:
    raise SearchError("this search has no objective to run; ask and tell by hand, or give one")
