"""confirm: whether the best plans hold with other seeds, on data that the search has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from normsearch.errors import SearchError
from normsearch.searching.posterior import Posterior
from normsearch.searching.space import SearchSpace
from normsearch.searching.tables import Table

#: One-sided 90 % quantiles of Student's t by degrees of freedom; the normal's from 30 on.
_T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)
_Z90 = 1.282


@dataclass(frozen=True)
class Candidate:
    """A plan to be confirmed.

    Attributes:
        number: of the trial that tried it.
        params: the trial's parameters.
        uniform: the method that stands wherever it may, None for a mix.
        value: the first objective in the search.

    """

    number: int
    params: Mapping[str, Any]
    uniform: str | None
    value: float


@dataclass(frozen=True)
class Confirmed:
    """A plan's scores under fresh seeds.

    Attributes:
        number: of the trial that tried it.
        uniform: as for ``Candidate``.
        searched: the first objective in the search.
        scores: the same under each seed, on the split for confirmation.
        gain: mean difference to the best uniform plan's, seed by seed, positive where better; None for that
            plan itself.
        error: that difference's standard error.
        beats: whether the gain is beyond noise.

    """

    number: int
    uniform: str | None
    searched: float
    scores: tuple[float, ...]
    gain: float | None
    error: float | None
    beats: bool

    @property
    def mean(self) -> float:
        """The mean score."""
        return fmean(self.scores)


def candidates(study: Study, space: SearchSpace, top: int, prior: Table | None = None) -> list[Candidate]:
    """Return the best uniform plan, then the ``top`` mixes that are expected to score best.

    Expected by the surrogate that ``NormSampler`` uses, whichever sampler proposed them: the luckiest of many
    noisy scores is not the best plan. Plans that violate a constraint are left out.

    Raises:
        SearchError: no finished trial meets the constraints.

    """
    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if feasible(t)]
    if not done:
        raise SearchError(_nothing(study))
    sign = -1.0 if study.directions[0] == StudyDirection.MINIMIZE else 1.0
    names = {t.number: space.uniform_method(t.params) for t in done}
    same = [t for t in done if names[t.number] is not None]
    mixes = [t for t in done if names[t.number] is None]
    scores = [sign * t.values[0] for t in done]
    likely = Posterior(space, done, scores, prior).expected() if len(done) > 1 else scores
    expected = dict(zip((t.number for t in done), likely, strict=True))
    mixes.sort(key=lambda t: (-expected[t.number], t.number))
    same.sort(key=lambda t: (-sign * t.values[0], t.number))
    kept: dict[tuple[tuple[str, str], ...], FrozenTrial] = {}
    for trial in (*same[:1], *mixes):
        plan = tuple(sorted(space.free(trial.params).items()))
        if plan not in kept and len(kept) < top + bool(same):
            kept[plan] = trial
    return [Candidate(t.number, t.params, names[t.number], t.values[0]) for t in kept.values()]


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial meets every constraint."""
    return all(value <= 0 for value in trial.constraints.values())


def decide(
    given: Sequence[Candidate],
    scores: Callable[[Candidate, int], float],
    seeds: Sequence[int],
    *,
    maximize: bool,
    samples: int | None = None,
) -> tuple[int, list[Confirmed]]:
    """Return the index of the plan to take, and the table that says why.

    The first candidate is the best uniform plan. Another is taken only if its mean gain over it, paired by
    seed, exceeds t₀.₉ standard errors; of those that do, the one with the best mean. Where the search tried
    no uniform plan, the best mean counts.

    Args:
        given: the best uniform plan first, if there is one.
        scores: runs a candidate under a seed.
        seeds: fresh ones.
        maximize: whether larger is better.
        samples: how many samples a score is a mean over; where scores are shares, a gain g is then known to
            √(g (1 − g) / samples) at best, however well the seeds agree.

    """
    sign = 1.0 if maximize else -1.0
    # Seed by seed, so that what is done when interrupted is comparable.
    columns = [[scores(candidate, seed) for candidate in given] for seed in seeds]
    found = np.array(columns).T
    reference = found[0] if given[0].uniform is not None else None
    rows = []
    for candidate, mine in zip(given, found, strict=True):
        gain = error = None
        beats = False
        if reference is not None and mine is not found[0] and candidate is not given[0]:
            differences = [float(d) for d in sign * (mine - reference)]
            gain = fmean(differences)
            error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
            if samples is not None and 0 < gain < 1 and found.min() >= 0 and found.max() <= 1:
                error = max(error, math.sqrt(gain * (1 - gain) / samples))
            beats = gain > _quantile(len(differences) - 1) * error and gain > 0
        rows.append(
            Confirmed(
                candidate.number,
                candidate.uniform,
                candidate.value,
                tuple(map(float, mine)),
                gain,
                error,
                beats,
            )
        )
    eligible = [i for i, row in enumerate(rows) if row.beats or (reference is not None and i == 0)]
    if reference is None:
        eligible = list(range(len(rows)))
    return max(eligible, key=lambda i: (sign * rows[i].mean, -i)), rows


def _quantile(freedom: int) -> float:
    if freedom < 1:
        return math.inf
    return _T90[freedom - 1] if freedom <= len(_T90) else _Z90 + 1.2 / freedom


def _nothing(study: Study) -> str:
    trials = study.get_trials(deepcopy=False)
    failed = [t for t in trials if t.state == TrialState.FAIL]
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    over = [t for t in pruned if any(value > 0 for value in t.constraints.values())]
    given_up = [t for t in pruned if t not in over]
    broken = [t for t in trials if t.state == TrialState.COMPLETE]
    if broken:
        nearest = min(broken, key=lambda t: sum(max(v, 0) for v in t.constraints.values()))
        missed = ", ".join(f"{name} by {v:.3g}" for name, v in nearest.constraints.items() if v > 0)
        return (
            f"none of {len(broken)} finished trials meets the constraints; the nearest, trial "
            f"{nearest.number}, misses {missed}; go on with more trials, or start another search with looser "
            "constraints or other methods"
        )
    if over and not given_up:
        nearest = min(over, key=lambda t: max(t.constraints.values()))
        name, excess = max(nearest.constraints.items(), key=lambda item: item[1])
        return (
            f"every plan that was proposed is above {name}, the cheapest, trial {nearest.number}, by "
            f"{excess:.3g} of the original's cost; start another search with a looser one or cheaper methods"
        )
    if not pruned and not failed:
        return f"no trial of {study.study_name!r} has finished; run more trials"
    counts = (
        (failed, "failed", "mend the objective"),
        (given_up, "pruned by the objective", "let it return a number for some plans"),
        (over, "above a ceiling", "start another search with a looser one"),
    )
    told = [f"{len(several)} {what}{_first_reason(several)}" for several, what, _ in counts if several]
    ways = [way for several, _, way in counts if several]
    return f"no trial of {study.study_name!r} has a score: {', '.join(told)}; {' or '.join(ways)}"


def _first_reason(trials: Sequence[FrozenTrial]) -> str:
    """Return what the first of some trials says of itself, in brackets."""
    why = trials[0].user_attrs.get("error")
    return f" (trial {trials[0].number}: {why})" if why else ""
