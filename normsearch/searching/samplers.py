"""Samplers by name, seeded, for a study's space."""

from __future__ import annotations

import optuna
from optuna.samplers import BaseSampler

from normsearch.errors import SearchError
from normsearch.searching.sampler import NormSampler
from normsearch.searching.space import SearchSpace
from normsearch.searching.studies import Memory

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
        known = {}
        if table is not None:
            known = {
                len(settings.directions) + index: space.by_choice(table.table(cost))
                for index, cost in enumerate(settings.costs)
            }
        return NormSampler(seed=seed, prior=memory.prior(), costs=known)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)
