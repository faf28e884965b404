"""The parts of a search's report as plain data; ``sections`` lists them with the others.

Scores are those of the search's first goal in its own direction; gains are positive where a plan is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One number that a search maximises or minimises."""

    name: str
    maximize: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The plan that a search returned, and how it compares with the best uniform one.

    Attributes:
        name: ``all group`` or ``trial 12``.
        methods: how many sites have each method.
        uniform: whether it is the same method wherever that may stand.
        score: the mean over the seeds of the confirmation.
        seeds: their number; 0 where the search is not confirmed yet, and ``score`` is one trial's.
        mixes: how many mixes were confirmed.
        same_split: whether the confirmation used the data of the search.
        reference: name of the best uniform plan; None without one.
        gain: mean difference to it, seed by seed; None for that plan itself.
        error: the difference's standard error.

    """

    name: str
    methods: dict[str, int]
    uniform: bool
    score: float | None
    seeds: int
    mixes: int = 0
    same_split: bool = False
    reference: str | None = None
    gain: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchPart:
    """What was searched, and what came of it.

    Attributes:
        study: its name.
        sampler: what proposed plans.
        seed: of everything random.
        goals: what is maximised and minimised.
        constraints: what plans must keep to.
        methods: spellings to choose from.
        sites: number of sites of the model.
        searched: number of those that may change.
        choices: number of decisions, tied sites being one.
        plans: number of plans that may be tried.
        trials: how many were asked for.
        states: how many are complete, infeasible, pruned, failed, running and waiting.
        outcome: the plan to use; None as long as no trial is complete.

    """

    kind: Literal["search"] = "search"
    study: str
    sampler: str
    seed: int
    goals: tuple[Goal, ...]
    constraints: tuple[str, ...] = ()
    methods: tuple[str, ...]
    sites: int
    searched: int
    choices: int
    plans: int
    trials: int
    states: dict[str, int]
    outcome: Outcome | None = None


@dataclass(frozen=True, kw_only=True)
class PlanScore:
    """What a plan scored.

    Attributes:
        name: ``all group`` or ``trial 12``.
        trial: its trial's number.
        uniform: whether it is a uniform plan.
        searched: its score in the search, one seed; None where it has none.
        scores: its scores in the confirmation, one for each seed; none where it was not confirmed.
        gain: mean difference to the best uniform plan's, seed by seed; None for that plan itself.
        error: the difference's standard error; None for a single seed.
        beats: whether the gain is beyond noise.
        feasible: whether it meets the constraints.
        chosen: whether the search returned it.

    """

    name: str
    trial: int
    uniform: bool
    searched: float | None
    scores: tuple[float, ...] = ()
    gain: float | None = None
    error: float | None = None
    beats: bool = False
    feasible: bool = True
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The uniform plans and those that were confirmed.

    Attributes:
        goal: what the scores are.
        rows: the plans.
        seeds: those of the confirmation.
        same_split: whether the confirmation used the data of the search.

    """

    kind: Literal["scores"] = "scores"
    goal: Goal
    rows: tuple[PlanScore, ...]
    seeds: tuple[int, ...] = ()
    same_split: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One site of the plan.

    Attributes:
        site: its path.
        before: the method that stood there.
        after: the method that the plan has there.
        uniform: the method of the best uniform plan there; None where that is the plan, or there is none.
        searched: whether the search could change it.

    """

    site: str
    before: str
    after: str
    uniform: str | None = None
    searched: bool = True


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The plan as a difference to the original, and to the best uniform plan.

    Attributes:
        name: ``all group`` or ``trial 12``.
        reference: name of the best uniform plan; None where it is the plan, or there is none.
        rows: every site, in the model's order.

    """

    kind: Literal["chosen"] = "chosen"
    name: str
    reference: str | None
    rows: tuple[PlanRow, ...]


@dataclass(frozen=True, kw_only=True)
class EffectCell:
    """A method at a choice.

    Attributes:
        mean: expected gain of changing the plan to it there; 0 for the plan's own.
        deviation: standard deviation of the changed plan's expected score.
        trials: how many complete trials had it there.

    """

    mean: float
    deviation: float
    trials: int


@dataclass(frozen=True, kw_only=True)
class EffectRow:
    """One choice: a site, or several that are tied.

    Attributes:
        sites: their paths.
        cells: one for each method; None where it may not stand.
        chosen: place of the plan's method.

    """

    sites: tuple[str, ...]
    cells: tuple[EffectCell | None, ...]
    chosen: int | None = None


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What all trials together say about every method at every choice.

    Attributes:
        goal: whose scores.
        plan: name of the plan that the effects are changes of.
        methods: their spellings.
        rows: one for each choice with more than one method.

    """

    kind: Literal["effects"] = "effects"
    goal: Goal
    plan: str
    methods: tuple[str, ...]
    rows: tuple[EffectRow, ...]


@dataclass(frozen=True, kw_only=True)
class ImportanceRow:
    """How much depends on one choice.

    Attributes:
        sites: paths of the choice.
        spread: standard deviation of the expected gains of its methods.
        share: of all choices' squared spreads.

    """

    sites: tuple[str, ...]
    spread: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Importances:
    """How much depends on each choice, the largest first."""

    kind: Literal["importances"] = "importances"
    goal: Goal
    rows: tuple[ImportanceRow, ...]


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """One trial.

    Attributes:
        number: its number.
        state: ``complete``, ``infeasible`` (complete, but breaks a constraint), ``pruned`` (its known cost is
            too high), ``failed``, ``running`` or ``waiting``.
        origin: ``uniform``, ``prior`` (what sensing suggests), ``learned`` (what gates have learned), or
            ``sampler``.
        values: one for each goal; none where it has no score.
        name: its plan's where that is uniform.
        chosen: whether the search returned its plan.
        reason: why it failed or is not feasible.

    """

    number: int
    state: str
    origin: str
    values: tuple[float, ...] = ()
    name: str | None = None
    chosen: bool = False
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The trials in the order of their numbers."""

    kind: Literal["trials"] = "trials"
    goals: tuple[Goal, ...]
    rows: tuple[TrialPoint, ...]


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A complete trial among several goals.

    Attributes:
        number: its number.
        values: one for each goal.
        name: its plan's where that is uniform.
        best: whether no other trial is as good in every goal and better in one.
        chosen: whether the search returned its plan.

    """

    number: int
    values: tuple[float, ...]
    name: str | None = None
    best: bool = False
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Front:
    """The trials that meet the constraints, and which of them no other one beats in every goal."""

    kind: Literal["front"] = "front"
    goals: tuple[Goal, ...]
    points: tuple[FrontPoint, ...]


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """What a plan costs in all."""

    name: str
    latency: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What each method costs at one site more than BatchNorm; None where it may not stand.

    Attributes:
        site: its path.
        latency: seconds.
        memory: bytes.
        chosen: place of the plan's method.

    """

    site: str
    latency: tuple[float | None, ...]
    memory: tuple[float | None, ...]
    chosen: int | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What plans cost, as a sum of what each method was measured to cost at each site.

    Attributes:
        methods: their spellings.
        rows: one for each site that is searched.
        plans: the original, uniform plans and the plan of the search.
        device: where it was measured.
        threads: with how many threads.

    """

    kind: Literal["costs"] = "costs"
    methods: tuple[str, ...]
    rows: tuple[CostRow, ...]
    plans: tuple[PlanCost, ...] = field(default=())
    device: str
    threads: int


SearchSection = SearchPart | Scores | Chosen | Effects | Importances | Trials | Front | Costs

SEARCH_SECTIONS: dict[str, type[SearchSection]] = {
    "search": SearchPart,
    "scores": Scores,
    "chosen": Chosen,
    "trials": Trials,
    "front": Front,
    "effects": Effects,
    "importances": Importances,
    "costs": Costs,
}
