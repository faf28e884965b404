"""search_report: what a search found, as a document of ``normsearch.reporting``."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import pstdev
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from normsearch.plans import Plan
from normsearch.reporting import Document, parts, sections
from normsearch.reporting import search_sections as made
from normsearch.reports import Environment
from normsearch.searching.confirming import candidates, feasible
from normsearch.searching.costs import CostTable
from normsearch.searching.leases import ERROR
from normsearch.searching.posterior import Effect, Posterior
from normsearch.searching.results import SearchResult
from normsearch.searching.searches import Search
from normsearch.searching.studies import Memory
from normsearch.searching.trials import counted_trials
from normsearch.sensitivities import Sensitivity

_STATES = {
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_ORIGINS = ("uniform", "prior", "learned")


def search_report(
    found: SearchResult | Search,
    *,
    score: str = "score",
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Document:
    """Return the report of a search, finished or not; ``save`` writes it as HTML and JSON.

    Nothing is run: it holds what the study and the confirmation know.

    Args:
        found: what ``search`` returned; or a ``Search``, of which nothing has been confirmed yet.
        score: what the objective's first number is, for example ``accuracy``.
        title: what the report is about; by default the study's name.
        notes: what else its readers should know.

    Example:
        >>> import torch
        >>> from normsearch.searching import Search, search_report
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> run = Search(model, lambda converted, trial: 0.5, methods=["batch", "group"], n_trials=2)
        >>> run.optimize()
        >>> [section.kind for section in search_report(run).sections][:3]
        ['search', 'scores', 'chosen']

    """
    known = _known(found, score)
    maker = _Maker(known)
    given = [
        maker.summary(),
        maker.scores(),
        maker.chosen(),
        maker.trials(),
        maker.front(),
        maker.effects(),
        maker.importances(),
        maker.costs(),
        maker.sensitivity(),
        maker.notes(notes),
    ]
    # The package imports this module.
    from normsearch import __version__

    return Document(
        title=known.memory.study.study_name if title is None else title,
        environment=Environment.here(known.model),
        normsearch=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sections=tuple(part for part in given if part is not None),
    )


@dataclass(frozen=True)
class _Known:
    """What a report is made from.

    ``best``: the trial whose plan counts, returned or leading; None as long as none is complete.
    ``confirmed``: rows of the confirmation by trial; ``reference``: the trial of the best uniform plan.
    """

    memory: Memory
    search: Search | SearchResult
    model: nn.Module
    score: str
    best: int | None
    reference: int | None
    confirmed: Mapping[int, Any]
    same_split: bool
    sensitivity: Sensitivity | None


def _known(found: SearchResult | Search, score: str) -> _Known:
    memory = Memory(found.study)
    if isinstance(found, SearchResult):
        return _Known(
            memory,
            found,
            found.model,
            score,
            found.candidates[found.chosen].number,
            next((one.number for one in found.candidates if one.uniform is not None), None),
            {row.number: row for row in found.confirmation},
            found.same_split,
            found.sensitivity,
        )
    done = found.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = reference = None
    if any(map(feasible, done)):
        leading = candidates(found.study, found.space, 1, memory.prior())
        reference = next((one.number for one in leading if one.uniform is not None), None)
        sign = -1.0 if found.study.directions[0] == StudyDirection.MINIMIZE else 1.0
        best = max(leading, key=lambda one: sign * one.value).number
    return _Known(memory, found, found.resident.model, score, best, reference, {}, False, found.sensitivity)


class _Maker:
    """The sections of a search's report."""

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._space, self._study = known.search.space, known.search.study
        self._settings = known.memory.settings()
        self._wanted: int = known.memory.read("n_trials")
        self._trials = counted_trials(self._study.get_trials(deepcopy=False))
        self._by_number = {trial.number: trial for trial in self._trials}
        uniform = {tuple(sorted(self._space.uniform(m).items())): m for m in reversed(self._space.methods)}
        self._uniform = {
            trial.number: uniform[plan]
            for trial in self._trials
            if (plan := self._plan_key(trial)) in uniform
        }

    def summary(self) -> made.SearchPart:
        """Return what was searched, and what came of it."""
        settings, space = self._settings, self._space
        return made.SearchPart(
            study=self._study.study_name,
            sampler="norm" if settings.sampler == "auto" else settings.sampler,
            seed=settings.seed,
            goals=self._goals,
            constraints=tuple(_constraint(name, fields) for name, fields in settings.constraints),
            methods=space.methods,
            sites=len(space.sites),
            searched=len(space.allowed),
            choices=len(space.distributions),
            plans=space.size,
            trials=self._wanted,
            states=dict(Counter(map(_state, self._trials))),
            outcome=self._outcome(),
        )

    def _outcome(self) -> made.Outcome | None:
        known = self._known
        if known.best is None:
            return None
        row = known.confirmed.get(known.best)
        trial = self._by_number[known.best]
        return made.Outcome(
            name=self._name(known.best),
            methods=dict(Counter(map(str, self._best_plan.values())).most_common()),
            uniform=known.best in self._uniform,
            score=trial.values[0] if row is None else parts.finite(row.mean),
            seeds=0 if row is None else len(row.scores),
            mixes=sum(number not in self._uniform for number in known.confirmed),
            same_split=known.same_split,
            reference=None if known.reference is None else self._name(known.reference),
            gain=None if row is None else parts.finite(row.gain),
            error=None if row is None else parts.finite(row.error),
        )

    def scores(self) -> made.Scores | None:
        """Return the uniform plans and those that were confirmed."""
        known = self._known
        seen: set[str] = set()
        rows = []
        for trial in self._trials:
            method = self._uniform.get(trial.number)
            wanted = trial.number in known.confirmed or trial.number == known.best
            if not wanted and (method is None or method in seen or not trial.state.is_finished()):
                continue
            if method is not None:
                seen.add(method)
            row = known.confirmed.get(trial.number)
            rows.append(
                made.PlanScore(
                    name=self._name(trial.number),
                    trial=trial.number,
                    uniform=method is not None,
                    searched=trial.values[0] if trial.values else None,
                    scores=() if row is None else row.scores,
                    gain=None if row is None else parts.finite(row.gain),
                    error=None if row is None else parts.finite(row.error),
                    beats=row is not None and row.beats,
                    feasible=_state(trial) == "complete",
                    chosen=trial.number == known.best and bool(known.confirmed),
                )
            )
        if not rows:
            return None
        seeds = max((len(row.scores) for row in rows), default=0)
        first = self._settings.seed + 1
        # The plans that were confirmed first, the best uniform one at their head as it is the reference.
        rows.sort(key=lambda row: (not row.scores, not row.uniform if row.scores else False, row.trial))
        return made.Scores(
            goal=self._goals[0],
            rows=tuple(rows),
            seeds=tuple(range(first, first + seeds)),
            same_split=known.same_split,
        )

    def chosen(self) -> made.Chosen | None:
        """Return the plan as a difference to the original."""
        known = self._known
        if known.best is None:
            return None
        other = None if known.reference in (None, known.best) else known.reference
        against = None if other is None else self._space.plan(self._by_number[other].params)
        return made.Chosen(
            name=self._name(known.best),
            reference=None if other is None else self._name(other),
            rows=tuple(
                made.PlanRow(
                    site=site.path,
                    before="batch",
                    after=str(self._best_plan[site.path]),
                    uniform=None if against is None else str(against[site.path]),
                    searched=site.path in self._space.allowed,
                )
                for site in self._space.sites
            ),
        )

    def trials(self) -> made.Trials | None:
        """Return the trials."""
        rows = tuple(
            made.TrialPoint(
                number=trial.number,
                state=_state(trial),
                origin=self._origin(trial),
                values=tuple(trial.values or ()),
                name=self._name(trial.number) if trial.number in self._uniform else None,
                chosen=trial.number == self._known.best,
                reason=_reason(trial),
            )
            for trial in self._trials
        )
        return made.Trials(goals=self._goals, rows=rows) if rows else None

    def front(self) -> made.Front | None:
        """Return the trials among several goals; None where there is one."""
        done = [trial for trial in self._trials if _state(trial) == "complete"]
        if len(self._goals) < 2 or not done:
            return None
        signs = [1.0 if goal.maximize else -1.0 for goal in self._goals]
        scores = [[s * v for s, v in zip(signs, t.values, strict=True)] for t in done]
        return made.Front(
            goals=self._goals,
            points=tuple(
                made.FrontPoint(
                    number=trial.number,
                    values=tuple(trial.values),
                    name=self._name(trial.number) if trial.number in self._uniform else None,
                    best=not any(_dominates(other, mine) for other in scores),
                    chosen=trial.number == self._known.best,
                )
                for trial, mine in zip(done, scores, strict=True)
            ),
        )

    def effects(self) -> made.Effects | None:
        """Return the expected gain of every method at every choice."""
        if not self._expected:
            return None
        params = self._by_number[self._known.best or 0].params
        rows = []
        for choice in self._space.choices:
            here = self._expected.get(choice.name)
            if here is None:
                continue
            cells = [
                made.EffectCell(mean=here[m].mean, deviation=here[m].deviation, trials=here[m].trials)
                if m in here
                else None
                for m in self._space.methods
            ]
            place = self._space.methods.index(params[choice.name])
            rows.append(made.EffectRow(sites=choice.sites, cells=tuple(cells), chosen=place))
        return made.Effects(
            goal=self._goals[0],
            plan=self._name(self._known.best or 0),
            methods=self._space.methods,
            rows=tuple(rows),
        )

    def importances(self) -> made.Importances | None:
        """Return how much depends on each choice."""
        if not self._expected:
            return None
        sites = {choice.name: choice.sites for choice in self._space.choices}
        spreads = {
            name: pstdev([effect.mean for effect in row.values()]) for name, row in self._expected.items()
        }
        total = sum(spread**2 for spread in spreads.values()) or 1.0
        ranked = sorted(spreads, key=lambda name: -spreads[name])
        return made.Importances(
            goal=self._goals[0],
            rows=tuple(
                made.ImportanceRow(sites=sites[name], spread=spreads[name], share=spreads[name] ** 2 / total)
                for name in ranked
            ),
        )

    def costs(self) -> made.Costs | None:
        """Return what methods and plans cost; None where that was not measured."""
        table = self._known.memory.costs()
        if table is None:
            return None
        methods = self._space.methods
        rows = []
        for path, spellings in self._space.allowed.items():
            latency, memory = table.latency[path], table.memory[path]
            rows.append(
                made.CostRow(
                    site=path,
                    latency=tuple(latency[m] if m in spellings else None for m in methods),
                    memory=tuple(memory[m] if m in spellings else None for m in methods),
                    chosen=self._place(path),
                )
            )
        return made.Costs(
            methods=methods,
            rows=tuple(rows),
            plans=tuple(self._plan_costs(table)),
            device=table.device,
            threads=table.threads,
        )

    def _plan_costs(self, table: CostTable) -> list[made.PlanCost]:
        plans = [(f"all {m}", self._space.plan(self._space.uniform(m))) for m in self._space.methods]
        if self._known.best is not None and self._known.best not in self._uniform:
            plans.append((self._name(self._known.best), self._best_plan))
        return [
            made.PlanCost(name="the original", latency=table.base_latency, memory=table.base_memory),
            *(
                made.PlanCost(name=n, latency=table.of(p, "latency"), memory=table.of(p, "memory"))
                for n, p in plans
                if n != "all batch"
            ),
        ]

    def sensitivity(self) -> sections.HeatMap | None:
        """Return the drift of single changes that vetoes stand on."""
        drift, veto = self._known.sensitivity, self._settings.veto
        if drift is None or veto is None or self._known.best is None:
            return None
        return parts.heat_map(drift, self._best_plan, veto)

    def notes(self, given: Sequence[str]) -> sections.Notes | None:
        """Return what a reader should know, and what was refused."""
        texts = [*self._warnings(), *given]
        notes = [sections.Note(text=text) for text in texts]
        if self._known.best is not None:
            notes += [sections.Note(text=t, about=r.site.path) for r in self._best_plan.rows for t in r.notes]
        refusals = tuple(dict.fromkeys(self._space.refusals))
        return sections.Notes(notes=tuple(notes), refusals=refusals) if notes or refusals else None

    def _warnings(self) -> list[str]:
        known, states = self._known, Counter(map(_state, self._trials))
        said = []
        if not known.confirmed:
            said.append("Nothing is confirmed yet: scores are single runs on the data of the search.")
        else:
            seeds = max(len(row.scores) for row in known.confirmed.values())
            if known.same_split:
                said.append(
                    "The plans were confirmed on the data that they were chosen by, under fresh seeds alone: "
                    "their scores there flatter them. A Task, or an objective with a confirm method, keeps "
                    "data for it."
                )
            if seeds > 1 and all(len(set(row.scores)) == 1 for row in known.confirmed.values()):
                said.append(
                    "Every seed gave the same scores: nothing that the objective does depends on the seed, "
                    "so that the errors say nothing of the noise."
                )
            if seeds == 1:
                said.append("The confirmation has a single seed: it says nothing of the noise.")
        finished = sum(states[s] for s in ("complete", "infeasible", "pruned", "failed"))
        if finished < self._wanted:
            said.append(f"The search is not finished: {finished} of {self._wanted} trials are done.")
        reasons = Counter(
            trial.user_attrs.get(ERROR, "") for trial in self._trials if _state(trial) == "failed"
        )
        said += [
            f"{count} {'trial' if count == 1 else 'trials'} failed{f': {reason}' if reason else ''}."
            for reason, count in reasons.most_common(5)
        ]
        if states["pruned"]:
            said.append(
                f"{states['pruned']} plans were not trained: their known cost is above what is allowed."
            )
        if states["infeasible"]:
            said.append(f"{states['infeasible']} trained plans break a constraint and were not considered.")
        if len(self._goals) > 1:
            others = " and ".join(goal.name for goal in self._goals[1:])
            said.append(
                f"The plan is the best by {self._goals[0].name}; the Pareto front has those that trade it "
                f"for {others}."
            )
        return said

    @cached_property
    def _goals(self) -> tuple[made.Goal, ...]:
        directions = self._settings.directions
        names = [self._known.score, *(f"objective {n}" for n in range(2, len(directions) + 1))]
        own = [made.Goal(name=n, maximize=d == "maximize") for n, d in zip(names, directions, strict=True)]
        return (*own, *(made.Goal(name=cost, maximize=False) for cost in self._settings.costs))

    @cached_property
    def _best_plan(self) -> Plan:
        assert self._known.best is not None
        return self._space.plan(self._by_number[self._known.best].params)

    @cached_property
    def _expected(self) -> Mapping[str, Mapping[str, Effect]]:
        """The posterior's effects on the plan; empty where there is too little to say."""
        done = [trial for trial in self._trials if trial.state == TrialState.COMPLETE]
        if len(done) < 2 or self._known.best is None:
            return {}
        sign = 1.0 if self._goals[0].maximize else -1.0
        posterior = Posterior(
            self._space, done, [sign * trial.values[0] for trial in done], self._known.memory.prior()
        )
        return posterior.effects(self._by_number[self._known.best].params)

    def _place(self, path: str) -> int | None:
        if self._known.best is None:
            return None
        params = self._by_number[self._known.best].params
        allowed = self._space.allowed[path]
        for choice in self._space.choices:
            if path in choice.sites:
                spelling = params.get(choice.name, choice.methods[0])
                return self._space.methods.index(spelling if spelling in allowed else allowed[0])
        return None

    def _name(self, number: int) -> str:
        return f"all {self._uniform[number]}" if number in self._uniform else f"trial {number}"

    def _origin(self, trial: FrozenTrial) -> str:
        origin = trial.user_attrs.get("origin")
        return origin if origin in _ORIGINS else "sampler"

    def _plan_key(self, trial: FrozenTrial) -> tuple[tuple[str, str], ...] | None:
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        try:
            return tuple(sorted(self._space.free(params).items()))
        except KeyError:
            # A trial that was given up before its parameters were suggested.
            return None


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE:
        return "complete" if feasible(trial) else "infeasible"
    return _STATES[trial.state]


def _reason(trial: FrozenTrial) -> str | None:
    if trial.state == TrialState.FAIL:
        return str(trial.user_attrs.get(ERROR, "no reason is known"))
    over = [f"{name} by {value:.3g}" for name, value in trial.constraints.items() if value > 0]
    return f"misses {', '.join(over)}" if over else None


def _dominates(other: Sequence[float], mine: Sequence[float]) -> bool:
    return all(o >= m for o, m in zip(other, mine, strict=True)) and any(
        o > m for o, m in zip(other, mine, strict=True)
    )


def _constraint(name: str, fields: Mapping[str, float]) -> str:
    said = {
        "MaxDrop": "at most {drop:g} worse than the original",
        "MaxLatency": "at most {ratio:g} times the original's latency",
        "MaxMemory": "at most {ratio:g} times the original's memory",
        "BatchIndependent": "batch independent",
    }
    return said.get(name, name).format(**fields)
