"""prepare: what a search does once before its first trial, for all workers and resumptions."""

from __future__ import annotations

import glob
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from normsearch.errors import NormsearchError, SearchError
from normsearch.methods import Refusal
from normsearch.progress import OnProgress
from normsearch.searching.constraints import CEILINGS, BatchIndependent, MaxDrop
from normsearch.searching.costs import measure_costs
from normsearch.searching.objectives import Evaluation, Objective
from normsearch.searching.resident import Resident
from normsearch.searching.space import SearchSpace
from normsearch.searching.studies import Memory, Settings
from normsearch.searching.supernet import sense
from normsearch.searching.tasks import Task
from normsearch.searching.trainable import untrainable
from normsearch.searching.workers import evaluation
from normsearch.sensitivities import Sensitivity
from normsearch.site_effects import sensitivity

#: A single change that moves the output this far (relative L2) destroys more than a short training mends.
VETO = 0.75
#: Batches that drift is measured on.
_BATCHES = 4
#: A search can tell about one choice apart for so many trials.
_TRIALS_PER_CHOICE = 4
#: So many are never tied: there may be more trials later.
_FEWEST_CHOICES = 8
#: Plans from the prior that are tried first.
_FROM_PRIOR = 3
NO_INPUTS = "costs are measured on inputs; give inputs=, at least one batch"
#: How the reason of a veto begins; its threshold follows.
_VETOED = "alone it moves the output by more than"


def prepare(
    resident: Resident,
    memory: Memory,
    objective: Objective | Task | None,
    inputs: Iterable[Any] | None,
    n_trials: int,
    on_progress: OnProgress | None,
) -> None:
    """List, measure, veto, tie, sense and enqueue; each part is kept as soon as it is done.

    Raises:
        SearchError: something that is asked for needs inputs or the objective, or nothing is left to choose.

    """
    if memory.has("ready"):
        return
    settings = memory.settings()
    constraints = settings.built_constraints()
    batches = None if inputs is None else list(itertools.islice(inputs, _BATCHES))
    first = batches[0] if batches else None
    space = SearchSpace.of(
        resident.model,
        settings.methods,
        sites=settings.sites,
        inputs=first,
        batch_independent=any(isinstance(c, BatchIndependent) for c in constraints),
    )
    if isinstance(objective, Task):
        for spelling, why in untrainable(resident, space, objective, settings.seed).items():
            everywhere = {path: [spelling] for path in space.allowed}
            space = space.without(everywhere, f"the task cannot train it: {why}")
    if batches:
        space = _vetoed(space, resident, memory, settings.veto, batches, on_progress)
    if settings.costs or any(type(c) in CEILINGS for c in constraints):
        if first is None:
            raise SearchError(NO_INPUTS)
        if not memory.has("costs"):
            memory.keep("costs", asdict(measure_costs(resident, space, first, on_progress=on_progress)))
    space = space.tied(max(_FEWEST_CHOICES, n_trials // _TRIALS_PER_CHOICE))
    if space.size < 2:
        raise SearchError(_only_plan(space))
    memory.keep_space(space)
    if settings.sense and isinstance(objective, Task) and not memory.has("prior"):
        memory.keep("prior", sense(resident, space, objective, seed=settings.seed, on_progress=on_progress))
    if any(isinstance(c, MaxDrop) for c in constraints) and not memory.has("reference"):
        if objective is None:
            raise SearchError("MaxDrop needs the original's score; give the objective")
        memory.keep("reference", _original(resident, space, objective, memory))
    _enqueue_first(space, memory, settings, evaluation(resident, space, objective, memory))
    memory.keep("ready", True)


def _only_plan(space: SearchSpace) -> str:
    """Say which plan is left, where each other method may not stand, and why."""
    left = Counter(choice.methods[0] for choice in space.choices for _ in choice.sites)
    kept = " and ".join(
        f"{method} at {count} of {len(space.allowed)} sites" for method, count in left.items()
    )
    gone: dict[str, list[Refusal]] = {}
    for refusal in space.refusals:
        gone.setdefault(refusal.method, []).append(refusal)
    why = ", ".join(
        f"{method} at {len(found)} ({found[0].site!r}: {found[0].reason})" for method, found in gone.items()
    )
    vetoed = any(refusal.reason.startswith(_VETOED) for refusal in space.refusals)
    way = "give veto=None, or a larger one, or other methods=" if vetoed else "give other methods="
    return f"one plan only is left to try, {kept}; refused or vetoed: {why}; {way}"


def _original(resident: Resident, space: SearchSpace, objective: Objective | Task, memory: Memory) -> float:
    try:
        return evaluation(resident, space, objective, memory).original()[0]
    except NormsearchError:
        raise
    except Exception as error:
        raise SearchError(
            f"MaxDrop needs the original's score, and the objective failed on it ({type(error).__name__}: "
            f"{error}); it gets a trial without parameters there: suggest further ones only where "
            "trial.params is not empty, or leave MaxDrop out"
        ) from error


def _vetoed(
    space: SearchSpace,
    resident: Resident,
    memory: Memory,
    veto: float | None,
    batches: list[Any],
    on_progress: OnProgress | None,
) -> SearchSpace:
    """Return the space in the order of data, without methods that destroy the output at a site."""
    text = memory.read("sensitivity")
    if text is None:
        paths = [glob.escape(path) for path in space.allowed]
        drift = sensitivity(resident.model, space.methods, batches, sites=paths, on_progress=on_progress)
        memory.keep("sensitivity", drift.to_json())
    else:
        drift = Sensitivity.from_json(text)
    space = space.in_order(drift.sites)
    if veto is None:
        return space
    vetoes = {path: [m for m in spellings if m != "batch"] for path, spellings in drift.vetoes(veto).items()}
    return space.without(vetoes, f"{_VETOED} {veto:g}")


def _enqueue_first(space: SearchSpace, memory: Memory, settings: Settings, trials: Evaluation) -> None:
    """Let the uniform plans be tried first, then a few that the prior suggests; none over a ceiling."""
    first = [("uniform", space.uniform(m)) for m in ("batch", *space.methods) if m in space.methods]
    prior = memory.prior()
    if prior is not None:
        rng = np.random.default_rng([settings.seed, 0xF125])
        best = {name: max(row, key=lambda m: row[m]) for name, row in prior.items()}
        first.append(("prior", space.free(best)))
        first += [("prior", _drawn(prior, rng)) for _ in range(_FROM_PRIOR - 1)]
    seen: list[dict[str, str]] = []
    for origin, params in first:
        over = any(excess > 0 for excess in trials.excess(space.plan(params)).values())
        if params not in seen and not over:
            seen.append(params)
            # After an interruption this runs again: what is there already stays once.
            memory.study.enqueue_trial(params, user_attrs={"origin": origin}, skip_if_exists=True)


def _drawn(prior: Mapping[str, Mapping[str, float]], rng: np.random.Generator) -> dict[str, str]:
    """Return a plan drawn with odds e^(z), z being the prior's values in their own standard deviations."""
    spread = float(np.std([value for row in prior.values() for value in row.values()])) or 1.0
    drawn = {}
    for name, row in prior.items():
        odds = np.exp(np.array(list(row.values())) / spread)
        drawn[name] = list(row)[int(rng.choice(len(row), p=odds / odds.sum()))]
    return drawn
