"""Landscapes whose every plan has a known score: sums of effects of sites, of two sites, and of three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Plans = NDArray[np.int64]


@dataclass(frozen=True)
class Landscape:
    """Scores of plans; larger is better.

    Attributes:
        name: family and size.
        sites: number of sites.
        methods: number of methods at each.
        score: scores of plans (n, sites) without noise.
        noise: standard deviation of one evaluation.
        best: the best score there is; for constructed ones, the best that repeated climbs find.
        mean: mean score of random plans.
        effects: each site's own effects (sites, methods): what a prior would like to know.

    """

    name: str
    sites: int
    methods: int
    score: Callable[[Plans], Floats]
    noise: float
    best: float
    mean: float
    effects: Floats

    def regret(self, plan: Plans) -> float:
        """Return 0 for the best plan, 1 for a random one in the mean."""
        return float((self.best - self.score(plan[None])[0]) / (self.best - self.mean))

    def prior(self, correlation: float, seed: int) -> Floats:
        """Return a table that correlates this much with the sites' own effects."""
        rng = np.random.default_rng([seed, 7])
        noise = rng.normal(0, self.effects.std(), self.effects.shape)
        mixed: Floats = correlation * self.effects + np.sqrt(1 - correlation**2) * noise
        return mixed


def effects_landscape(
    seed: int, sites: int, methods: int = 7, order: int = 2, noise: float = 0.3
) -> Landscape:
    """Return main effects with a share common to all sites, and interactions of neighbours and others.

    The score of a random plan has standard deviation one. Main effects explain three quarters of it, of
    which what all sites share is 35 %; sites differ in how much they matter (log-normal). ``order`` 3 gives
    a third of the interactions' part to triples.
    """
    rng = np.random.default_rng([seed, sites, order])
    matters = np.exp(rng.normal(0, 0.8, sites))[:, None]
    main = matters * (
        np.sqrt(0.35) * rng.normal(size=methods) + np.sqrt(0.65) * rng.normal(size=(sites, methods))
    )
    main -= main.mean(1, keepdims=True)
    groups = [(i, i + 1) for i in range(sites - 1)]
    groups += [tuple(sorted(rng.choice(sites, 2, replace=False))) for _ in range(sites // 2)]
    triples = [tuple(sorted(rng.choice(sites, 3, replace=False))) for _ in range(sites)] if order == 3 else []
    pairs = [rng.normal(size=(methods, methods)) for _ in groups]
    cubes = [rng.normal(size=(methods,) * 3) for _ in triples]

    def of_main(x: Plans) -> Floats:
        return np.asarray(main[np.arange(sites), x].sum(1))

    def of_pairs(x: Plans) -> Floats:
        return np.asarray(sum(t[x[:, a], x[:, b]] for (a, b), t in zip(groups, pairs, strict=True)))

    def of_triples(x: Plans) -> Floats:
        tables = zip(triples, cubes, strict=True)
        return np.asarray(sum((t[x[:, a], x[:, b], x[:, c]] for (a, b, c), t in tables), np.zeros(len(x))))

    sample = rng.integers(0, methods, (4000, sites))
    parts = [(of_main, 0.75), (of_pairs, 0.25 if order == 2 else 0.15)]
    parts += [(of_triples, 0.10)] if order == 3 else []
    scaled = [(part, np.sqrt(share) / part(sample).std()) for part, share in parts]

    def score(x: Plans) -> Floats:
        return np.asarray(sum(part(x) * factor for part, factor in scaled))

    best = _best(score, rng, sites, methods)
    return Landscape(
        f"{'pairs' if order == 2 else 'triples'}, {sites} sites",
        sites,
        methods,
        score,
        noise,
        best,
        float(score(sample).mean()),
        main * scaled[0][1],
    )


def table_landscape(name: str, table: Floats) -> Landscape:
    """Return a landscape whose scores were measured: (methods,) * sites."""
    everywhere = range(table.ndim)
    main = [table.mean(tuple(other for other in everywhere if other != site)) for site in everywhere]
    return Landscape(
        name,
        table.ndim,
        table.shape[0],
        lambda plans: np.asarray(table[tuple(plans.T)]),
        0.0,
        float(table.max()),
        float(table.mean()),
        np.array(main) - table.mean(),
    )


#: At 53 sites, climbs from random plans stay 1.5 % below what climbs from disturbed best plans find.
_CLIMBS, _ROUNDS, _DISTURBED = 60, 8, 0.15


def _best(score: Callable[[Plans], Floats], rng: np.random.Generator, sites: int, methods: int) -> float:
    """Return the best score that climbs from random plans, and then from the disturbed best plan, find."""
    plans, values = _climbed(score, rng, rng.integers(0, methods, (_CLIMBS, sites)), methods)
    for _ in range(_ROUNDS):
        best = plans[values.argmax()]
        plans = np.where(
            rng.random(plans.shape) < _DISTURBED, rng.integers(0, methods, plans.shape), best[None]
        )
        plans[0] = best
        plans, values = _climbed(score, rng, plans, methods)
    return float(values.max())


def _climbed(
    score: Callable[[Plans], Floats], rng: np.random.Generator, plans: Plans, methods: int
) -> tuple[Plans, Floats]:
    """Return local optima and their scores."""
    climbs, sites = plans.shape
    values = score(plans)
    while True:
        before = values.copy()
        for site in rng.permutation(sites):
            options = np.repeat(plans[None], methods, 0)
            options[:, :, site] = np.arange(methods)[:, None]
            all_scores = score(options.reshape(-1, sites)).reshape(methods, climbs)
            plans[:, site] = all_scores.argmax(0)
            values = all_scores.max(0)
        if np.allclose(values, before, atol=1e-12):
            return plans, values
