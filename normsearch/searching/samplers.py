"""Samplers by name, seeded, for a study's space."""

from __future__ import annotations

import optuna
from optuna.samplers import BaseSampler

from normsearch.errors import SearchError
from normsearch.searching.constraints import CEILINGS, MaxLatency, MaxMemory
from normsearch.searching.costs import CostTable
from normsearch.searching.sampler import NormSampler
from normsearch.searching.space import SearchSpace
from normsearch.searching.studies import Memory, Settings
from normsearch.searching.tables import Table

SAMPLERS = ("auto", "norm", "tpe", "gp", "nsga2", "random")


def check_sampler(name: str) -> None:
    """Raise a ``SearchError`` for anything but a sampler's name."""
    if name not in SAMPLERS:
        raise SearchError(
            f"sampler={name!r} is none of {', '.join(SAMPLERS)}; give one of these, or a sampler of Optuna's"
        )


def sampler_named(name: str, memory: Memory, space: SearchSpace) -> BaseSampler:
    """Return a sampler for a study.

    Raises:
        SearchError: there is none of this name.

    """
    check_sampler(name)
    settings = memory.settings()
    seed = settings.seed
    if name in ("auto", "norm"):
        table = memory.costs()
        known: dict[int, Table] = {}
        if table is not None:
            for index, cost in enumerate(settings.costs):
                added = space.by_choice(table.table(cost))
                known[len(settings.directions) + index] = {name: added[name] for name in space.distributions}
        prior = memory.prior()
        if prior is not None and settings.directions[0] == "minimize":
            # Of sensing, larger is better; of a sampler's prior, larger is a larger score.
            prior = {name: {m: -value for m, value in row.items()} for name, row in prior.items()}
        return NormSampler(seed=seed, prior=prior, costs=known, ceilings=_ceilings(settings, table, space))
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _ceilings(settings: Settings, table: CostTable | None, space: SearchSpace) -> list[tuple[Table, float]]:
    """Return what each choice adds to every cost with a ceiling, and how much all may add."""
    found: list[tuple[Table, float]] = []
    for constraint in settings.built_constraints():
        if isinstance(constraint, MaxLatency | MaxMemory):
            assert table is not None
            cost = CEILINGS[type(constraint)]
            # The excess by which ``Evaluation`` prunes, less what no choice changes.
            added, base = space.by_choice(table.table(cost)), table.base(cost)
            fixed = sum(min(added.pop(c.name).values()) for c in space.choices if len(c.methods) == 1)
            found.append((added, constraint.ratio * (base or 1.0) - base - fixed))
    return found
