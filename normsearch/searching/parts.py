"""The sections of a search's report, made from what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import pstdev

from normsearch.reporting import parts, sections
from normsearch.reporting import search_sections as made
from normsearch.searching.concluding import fresh_seeds
from normsearch.searching.costs import CostTable
from normsearch.searching.findings import Findings, reason, state


def summary(found: Findings) -> made.SearchPart:
    """Return what was searched, and what came of it."""
    settings, space = found.settings, found.space
    return made.SearchPart(
        study=found.study.study_name,
        sampler="norm" if settings.sampler == "auto" else settings.sampler,
        seed=settings.seed,
        goals=found.goals,
        constraints=tuple(_constraint(name, fields) for name, fields in settings.constraints),
        methods=space.methods,
        sites=len(space.sites),
        searched=len(space.allowed),
        choices=len(space.distributions),
        plans=space.size,
        trials=found.wanted,
        states=dict(Counter(map(state, found.counted))),
        outcome=_outcome(found),
    )


def _outcome(found: Findings) -> made.Outcome | None:
    if found.best is None:
        return None
    row = found.confirmed.get(found.best)
    trial = found.by_number[found.best]
    return made.Outcome(
        name=found.name(found.best),
        methods=dict(Counter(map(str, found.best_plan.values())).most_common()),
        uniform=found.best in found.uniform,
        score=trial.values[0] if row is None else parts.finite(row.mean),
        seeds=0 if row is None else len(row.scores),
        mixes=sum(number not in found.uniform for number in found.confirmed),
        same_split=found.same_split,
        reference=None if found.reference is None else found.name(found.reference),
        gain=None if row is None else parts.finite(row.gain),
        error=None if row is None else parts.finite(row.error),
    )


def scores(found: Findings) -> made.Scores | None:
    """Return the uniform plans and those that were confirmed."""
    seen: set[str] = set()
    rows = []
    for trial in found.counted:
        method = found.uniform.get(trial.number)
        wanted = trial.number in found.confirmed or trial.number == found.best
        if not wanted and (method is None or method in seen or not trial.state.is_finished()):
            continue
        if method is not None:
            seen.add(method)
        row = found.confirmed.get(trial.number)
        rows.append(
            made.PlanScore(
                name=found.name(trial.number),
                trial=trial.number,
                uniform=method is not None,
                searched=trial.values[0] if trial.values else None,
                scores=() if row is None else row.scores,
                gain=None if row is None else parts.finite(row.gain),
                error=None if row is None else parts.finite(row.error),
                beats=row is not None and row.beats,
                feasible=state(trial) == "complete",
                chosen=trial.number == found.best and bool(found.confirmed),
            )
        )
    if not rows:
        return None
    seeds = max((len(row.scores) for row in rows), default=0)
    # The plans that were confirmed first, the best uniform one at their head as it is the reference.
    rows.sort(key=lambda row: (not row.scores, not row.uniform if row.scores else False, row.trial))
    return made.Scores(
        goal=found.goals[0],
        rows=tuple(rows),
        seeds=tuple(fresh_seeds(found.memory, seeds)),
        same_split=found.same_split,
    )


def chosen(found: Findings) -> made.Chosen | None:
    """Return the plan as a difference to the original."""
    if found.best is None:
        return None
    other = None if found.reference in (None, found.best) else found.reference
    against = None if other is None else found.space.plan(found.by_number[other].params)
    return made.Chosen(
        name=found.name(found.best),
        reference=None if other is None else found.name(other),
        rows=tuple(
            made.PlanRow(
                site=site.path,
                before="batch",
                after=str(found.best_plan[site.path]),
                uniform=None if against is None else str(against[site.path]),
                searched=site.path in found.space.allowed,
            )
            for site in found.space.sites
        ),
    )


def trials(found: Findings) -> made.Trials | None:
    """Return the trials."""
    rows = tuple(
        made.TrialPoint(
            number=trial.number,
            state=state(trial),
            origin=found.origin(trial),
            values=tuple(trial.values or ()),
            name=found.name(trial.number) if trial.number in found.uniform else None,
            chosen=trial.number == found.best,
            reason=reason(trial),
        )
        for trial in found.counted
    )
    return made.Trials(goals=found.goals, rows=rows) if rows else None


def front(found: Findings) -> made.Front | None:
    """Return the trials among several goals; None where there is one."""
    done = [trial for trial in found.counted if state(trial) == "complete"]
    if len(found.goals) < 2 or not done:
        return None
    signs = [1.0 if goal.maximize else -1.0 for goal in found.goals]
    scores = [[s * v for s, v in zip(signs, t.values, strict=True)] for t in done]
    return made.Front(
        goals=found.goals,
        points=tuple(
            made.FrontPoint(
                number=trial.number,
                values=tuple(trial.values),
                name=found.name(trial.number) if trial.number in found.uniform else None,
                best=not any(_dominates(other, mine) for other in scores),
                chosen=trial.number == found.best,
            )
            for trial, mine in zip(done, scores, strict=True)
        ),
    )


def effects(found: Findings) -> made.Effects | None:
    """Return the expected gain of every method at every choice."""
    if not found.expected:
        return None
    params = found.by_number[found.best or 0].params
    rows = []
    for choice in found.space.choices:
        here = found.expected.get(choice.name)
        if here is None:
            continue
        cells = [
            made.EffectCell(mean=here[m].mean, deviation=here[m].deviation, trials=here[m].trials)
            if m in here
            else None
            for m in found.space.methods
        ]
        place = found.space.methods.index(params[choice.name])
        rows.append(made.EffectRow(sites=choice.sites, cells=tuple(cells), chosen=place))
    return made.Effects(
        goal=found.goals[0],
        plan=found.name(found.best or 0),
        methods=found.space.methods,
        rows=tuple(rows),
    )


def importances(found: Findings) -> made.Importances | None:
    """Return how much depends on each choice."""
    if not found.expected:
        return None
    sites = {choice.name: choice.sites for choice in found.space.choices}
    spreads = {name: pstdev([effect.mean for effect in row.values()]) for name, row in found.expected.items()}
    # Squares of large spreads would overflow.
    largest = max(spreads.values()) or 1.0
    squares = {name: (spread / largest) ** 2 for name, spread in spreads.items()}
    total = sum(squares.values()) or 1.0
    ranked = sorted(spreads, key=lambda name: -spreads[name])
    return made.Importances(
        goal=found.goals[0],
        rows=tuple(
            made.ImportanceRow(sites=sites[name], spread=spreads[name], share=squares[name] / total)
            for name in ranked
        ),
    )


def costs(found: Findings) -> made.Costs | None:
    """Return what methods and plans cost; None where that was not measured."""
    table = found.memory.costs()
    if table is None:
        return None
    methods = found.space.methods
    rows = []
    for path, spellings in found.space.allowed.items():
        latency, memory = table.latency[path], table.memory[path]
        rows.append(
            made.CostRow(
                site=path,
                latency=tuple(latency[m] if m in spellings else None for m in methods),
                memory=tuple(memory[m] if m in spellings else None for m in methods),
                chosen=found.place(path),
            )
        )
    return made.Costs(
        methods=methods,
        rows=tuple(rows),
        plans=tuple(_plan_costs(found, table)),
        device=table.device,
        threads=table.threads,
    )


def _plan_costs(found: Findings, table: CostTable) -> list[made.PlanCost]:
    plans = [(f"all {m}", found.space.plan(found.space.uniform(m))) for m in found.space.methods]
    if found.best is not None and found.best not in found.uniform:
        plans.append((found.name(found.best), found.best_plan))
    return [
        made.PlanCost(name="the original", latency=table.base_latency, memory=table.base_memory),
        *(
            made.PlanCost(name=n, latency=table.of(p, "latency"), memory=table.of(p, "memory"))
            for n, p in plans
            if n != "all batch"
        ),
    ]


def sensitivity(found: Findings) -> sections.HeatMap | None:
    """Return the drift of single changes that vetoes stand on."""
    drift, veto = found.sensitivity, found.settings.veto
    if drift is None or veto is None or found.best is None:
        return None
    return parts.heat_map(drift, found.best_plan, veto)


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
