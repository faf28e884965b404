"""untrainable: which methods a task cannot train at all, found before trials are spent on them."""

from __future__ import annotations

import glob
from dataclasses import replace

from normsearch.errors import SearchError
from normsearch.plans import plan
from normsearch.searching.objectives import seeded
from normsearch.searching.resident import Resident
from normsearch.searching.space import SearchSpace
from normsearch.searching.tasks import Task


def untrainable(resident: Resident, space: SearchSpace, task: Task, seed: int) -> dict[str, str]:
    """Return the methods with which one step of training fails, each with what was raised.

    BatchNorm cannot be trained on single samples, for example. Each method stands wherever it may, with
    frozen statistics elsewhere.

    Raises:
        SearchError: no method can be trained: loss, data or network do not fit together.

    """
    step = replace(task, recipe=replace(task.recipe, steps=1))
    failed: dict[str, Exception] = {}
    for spelling in space.methods:
        wanted = {
            glob.escape(path): [*([spelling] if spelling in allowed else ()), "frozen", "batch"]
            for path, allowed in space.allowed.items()
        }
        with seeded(seed), resident.converted(plan(resident.model, wanted)) as model:
            try:
                step.train_on(model)
            except Exception as error:
                failed[spelling] = error
    if len(failed) == len(space.methods):
        first = next(iter(failed.values()))
        raise SearchError(
            f"the task cannot train the network, whatever its normalization: {type(first).__name__}: "
            f"{first}; try one step of training by hand: loss(model(inputs), targets) of a pair of train"
        ) from first
    return {spelling: f"{type(error).__name__}: {error}" for spelling, error in failed.items()}
