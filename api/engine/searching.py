"""One piece of a search at a time, on a study that is given as plain data and lives in this process alone."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import CategoricalDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import nn

from api.engine import data
from api.engine.converting import Writing
from api.engine.labels import check_labels
from api.engine.networks import Network
from api.engine.sources import Report, following, original, title
from api.messages import Progressed
from api.search_tasks import (
    Concluding,
    Confirmed,
    ConfirmedPlan,
    Confirming,
    Found,
    Listed,
    Listing,
    Pair,
    Prepared,
    Proposed,
    Searching,
    StudyOf,
    TrialOf,
    Tried,
    Trying,
)
from normsearch.errors import CheckpointError, SearchError
from normsearch.inputs import spread
from normsearch.searching import (
    BatchIndependent,
    Constraint,
    MaxDrop,
    MaxLatency,
    MaxMemory,
    Recipe,
    Search,
    Task,
    accuracy,
)
from normsearch.searching.concluding import failures
from normsearch.searching.space import METHODS
from normsearch.searching.trials import finished_trials

_NAME = "search"
#: Shares of the samples that networks learn from, and that trials are scored on; the rest confirms.
_TRAIN, _VALIDATION = 0.6, 0.2


def prepare(asked: Searching, folder: Path, report: Report) -> Prepared:
    """Do what comes before the first trial."""
    _, search = _search(asked, None, folder, report)
    return Prepared(study=_told(search), trials=search.memory.read("n_trials"))


def run_trial(asked: Trying, folder: Path, report: Report) -> Tried:
    """Propose a plan, unless there is one, say which, train its network and score it."""
    _, search = _search(asked.search, asked.study, folder, report)
    known = {trial.number for trial in search.study.get_trials(deepcopy=False)}
    trial = search.resume(asked.number)
    note = Proposed(params=trial.params).model_dump()
    report(Progressed(stage="trial", done=0, total=0, note=note))
    values, state, error = None, "complete", None
    try:
        values = [float(value) for value in search.evaluate(trial)]
    except optuna.TrialPruned:
        state = "pruned"
    except MemoryError:
        raise
    except Exception as failure:
        state, error = "fail", f"{type(failure).__name__}: {failure}"[:1000]
    found = search.study.get_trials(deepcopy=False)
    return Tried.model_validate(
        {
            "params": trial.params,
            "state": state,
            "values": values,
            "constraints": trial.constraints,
            "error": error,
            "next": [_trial(one) for one in found if one.number not in known],
        }
    )


def pairs(asked: Listing, folder: Path, report: Report) -> Listed:
    """List the plans that are to be run again."""
    _, search = _search(asked.search, asked.study, folder, report)
    left = search.unconfirmed(confirm=asked.search.confirm, top=asked.search.top)
    return Listed(pairs=[Pair(number=candidate.number, seed=seed) for candidate, seed in left])


def confirm(asked: Confirming, folder: Path, report: Report) -> Confirmed:
    """Run a plan again under another seed."""
    _, search = _search(asked.search, asked.study, folder, report)
    for candidate, seed in search.unconfirmed(confirm=asked.search.confirm, top=asked.search.top):
        if (candidate.number, seed) == (asked.pair.number, asked.pair.seed):
            try:
                return Confirmed(score=search.confirm(candidate, seed))
            except SearchError:
                return Confirmed(score=None, error=failures(search.memory)[candidate.number].reason)
    raise SearchError(f"the plan of trial {asked.pair.number} is not to be run with seed {asked.pair.seed}")


def conclude(asked: Concluding, folder: Path, report: Report) -> Found:
    """Train the plan to use, and write its network and the report."""
    before, search = _search(asked.search, asked.study, folder, report)
    given = asked.search
    result = search.result(confirm=given.confirm, top=given.top, on_progress=following(report))
    written = Writing(folder, given.stem)
    written.weights(before, result.model, result.best, "searched")
    written.report(result.report(score="accuracy", title=title(given.source, before)))
    return Found(
        files=written.files,
        methods=dict(Counter(str(method) for method in result.best.values())),
        chosen=result.chosen,
        confirmation=[
            ConfirmedPlan(
                trial=row.number,
                uniform=row.uniform,
                searched=row.searched,
                scores=row.scores,
                gain=row.gain,
                error=None if row.error is None or not math.isfinite(row.error) else row.error,
                beats=row.beats,
            )
            for row in result.confirmation
        ],
        trials=finished_trials(search.study),
        notes=(*before.notes, *written.notes),
    )


def _search(asked: Searching, study: StudyOf | None, folder: Path, report: Report) -> tuple[Network, Search]:
    """Return the network and the search, as it stood or from the beginning."""
    before = original(asked.source, folder)
    limits = asked.constraints
    constraints: list[Constraint] = [BatchIndependent()] if limits.batch_independent else []
    for kind, most in ((MaxDrop, limits.max_drop), (MaxLatency, limits.max_latency)):
        constraints += [] if most is None else [kind(most)]
    constraints += [] if limits.max_memory is None else [MaxMemory(limits.max_memory)]
    search = Search(
        before.model,
        _task(before, asked, folder),
        methods=asked.methods or METHODS,
        sites=asked.sites,
        costs=asked.costs,
        constraints=constraints,
        n_trials=asked.trials,
        storage=InMemoryStorage() if study is None else _storage(study),
        name=_NAME,
        seed=asked.seed,
        veto=asked.veto,
        sense=asked.sense,
        on_progress=following(report),
    )
    return before, search


def _task(network: Network, asked: Searching, folder: Path) -> Task:
    """Return a dataset as a task: split, with the recipe, cross entropy and accuracy."""
    found = data.samples(network, asked.data, folder)
    if found.count is None:
        raise CheckpointError("the dataset's arrays have different lengths; give one label for each sample")
    rows = torch.tensor(spread(found.count, asked.data.samples))
    # Whoever sorted them, a split has something of everything.
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(asked.seed))]
    ends = int(_TRAIN * len(rows)), int((_TRAIN + _VALIDATION) * len(rows))
    train, validation, confirmation = rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :]
    size = asked.recipe.batch_size
    if len(train) < size or not len(validation):
        raise CheckpointError(
            f"the dataset has {len(rows)} samples, of which {len(train)} train: less than a batch of {size}; "
            "give more samples, or a smaller batch_size"
        )
    check_labels(network.model, found, rows, size)
    recipe = asked.recipe.model_dump(exclude={"batch_size"})
    return Task(
        train=_loader(found, train, size),
        validation=data.Pairs(found, validation, size),
        confirmation=data.Pairs(found, confirmation, size),
        loss=nn.functional.cross_entropy,
        metric=accuracy,
        recipe=Recipe(**recipe),
    )


def _loader(found: data.Samples, rows: torch.Tensor, size: int) -> Any:
    """Return whole batches of some samples, mixed anew each time they are read."""

    def batch(numbers: list[int]) -> Any:
        chosen = rows[torch.tensor(numbers)]
        return found.inputs(chosen), found.targets(chosen)

    numbers: Any = range(len(rows))
    # A last batch of one sample would be another network's problem.
    return torch.utils.data.DataLoader(
        numbers,
        batch_size=size,
        shuffle=True,
        drop_last=True,
        collate_fn=batch,
        generator=torch.Generator(),
    )


def _storage(study: StudyOf) -> InMemoryStorage:
    """Return a storage that holds a study with the same trials under the same numbers."""
    storage = InMemoryStorage()
    made = optuna.create_study(storage=storage, study_name=_NAME, directions=study.directions)
    for name, value in study.attributes.items():
        made.set_user_attr(name, value)
    distributions = {name: CategoricalDistribution(choices) for name, choices in study.choices.items()}
    for trial in study.trials:
        made.add_trial(_frozen(trial, distributions))
    return storage


def _frozen(trial: TrialOf, distributions: dict[str, CategoricalDistribution]) -> FrozenTrial:
    state = TrialState[trial.state.upper()]
    made = create_trial(
        state=state,
        values=trial.values if state == TrialState.COMPLETE else None,
        params=trial.params,
        distributions={name: distributions[name] for name in trial.params},
        user_attrs=trial.user,
        system_attrs={} if trial.fixed is None else {"fixed_params": trial.fixed},
        constraints=trial.constraints or None,
    )
    if trial.seconds is not None:
        made.datetime_start, made.datetime_complete = map(datetime.datetime.fromtimestamp, trial.seconds)
    return made


def _told(search: Search) -> StudyOf:
    """Return a study as plain data."""
    return StudyOf.model_validate(
        {
            "directions": [direction.name.lower() for direction in search.study.directions],
            "attributes": search.study.user_attrs,
            "choices": {name: one.choices for name, one in search.space.distributions.items()},
            "trials": list(_trials(search)),
        }
    )


def _trials(search: Search) -> Iterator[TrialOf]:
    return (_trial(trial) for trial in search.study.get_trials(deepcopy=False))


def _trial(trial: FrozenTrial) -> TrialOf:
    return TrialOf.model_validate(
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "params": trial.params,
            "fixed": trial.system_attrs.get("fixed_params"),
            "values": trial.values if trial.state == TrialState.COMPLETE else None,
            "constraints": trial.constraints,
            "user": {name: str(value) for name, value in trial.user_attrs.items() if value is not None},
        }
    )
