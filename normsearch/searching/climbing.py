"""Which plan promises most? Climbs over plans that change one site at a time."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from normsearch.searching.acquisitions import Acquisition
from normsearch.searching.ceilings import Ceilings
from normsearch.searching.surrogate import Floats, Plans, PlanSurrogate, Space

_SWEEPS = 8


class Walk(Protocol):
    """What is expected of a few plans, (S, L), while their sites change."""

    def changes(self, site: int) -> tuple[Floats, Floats]:
        """Return means and deviations for every method at one site, (S, K) each."""

    def set(self, site: int, methods: Plans) -> None:
        """Give one site of each plan its method, (S,)."""


@dataclass(frozen=True)
class Goal:
    """One objective, larger is better: what is known of it, and what was seen of it."""

    values: Floats
    model: PlanSurrogate | KnownSum

    def walk(self, plans: Plans) -> Walk:
        """Start from plans."""
        if isinstance(self.model, KnownSum):
            return _SumWalk(self.model.table, plans)
        return _SurrogateWalk(self.model, plans)


@dataclass(frozen=True)
class KnownSum:
    """An objective that is a known sum over sites: table (L, K)."""

    table: Floats

    def predict(self, plans: Plans) -> tuple[Floats, Floats]:
        """Return sums and zeros, (m,) each."""
        sums = self.table[np.arange(len(self.table)), plans].sum(1)
        return sums, np.zeros_like(sums)


class _SumWalk:
    def __init__(self, table: Floats, plans: Plans) -> None:
        self._table, self._plans = table, plans.copy()
        self._sums = table[np.arange(len(table)), plans].sum(1)

    def changes(self, site: int) -> tuple[Floats, Floats]:
        row = self._table[site]
        sums = self._sums[:, None] - row[self._plans[:, site]][:, None] + row
        return sums, np.zeros_like(sums)

    def set(self, site: int, methods: Plans) -> None:
        self._sums += self._table[site, methods] - self._table[site, self._plans[:, site]]
        self._plans[:, site] = methods


class _SurrogateWalk:
    """Keeps each plan's covariance with the evaluated ones: changing one site moves it by little arithmetic.

    All four components are linear in c_l, so with the derivative B_l = ∂k/∂c_l and the counts n of the
    evaluated plans, method k in place of a at site l gives k + (c_l(k) − c_l(a)) B_l + s (n_k − n_a).
    """

    def __init__(self, surrogate: PlanSurrogate, plans: Plans) -> None:
        self._surrogate, self._plans = surrogate, plans.copy()
        space = surrogate.space
        sites = space.sites
        shared, own, pairs, every = surrogate.variances[:4]
        self._own = own * surrogate.relevance / sites
        self._pairs = pairs / max(sites - 1, 1)
        self._every = 2 * every / max(sites * (sites - 1), 1)
        self._shared = shared / (sites * (1 - 1 / space.methods))
        low, gain = space.agreeing
        # c_l of every method with every evaluated plan, (L, n, K), and of these plans, (L, S, n).
        self._c_of = np.moveaxis(low[:, None] + gain[:, None] * space.onehot(surrogate.plans), 1, 0).copy()
        rows = np.arange(sites)[:, None]
        self._c = self._c_of.transpose(0, 2, 1)[rows, plans.T]
        self._total = self._c.sum(0)
        self._covariance = surrogate.covariance(plans)
        self._of_evaluated = space.onehot(surrogate.plans).sum(1)
        self._counts = space.onehot(plans).sum(1)
        self._prior = surrogate.sloped_prior
        self._prior_sum = surrogate.slopes @ surrogate.prior_mean(plans)
        self._index = np.arange(len(plans))

    def changes(self, site: int) -> tuple[Floats, Floats]:
        surrogate = self._surrogate
        before = self._plans[:, site]
        cross = self._changed(site)
        row = self._prior[site]
        expected = cross @ surrogate.weights + (self._prior_sum - row[before])[:, None] + row
        flat = cross.reshape(-1, cross.shape[2])
        explained = np.einsum("ij,ij->i", flat @ surrogate.inverse, flat).reshape(cross.shape[:2])
        squares = np.square(self._counts).sum(1)[:, None] + 2 * (
            self._counts - self._counts[self._index, before][:, None] + 1
        )
        squares[self._index, before] -= 2
        return surrogate.scores(expected, surrogate.variance(squares) - explained)

    def set(self, site: int, methods: Plans) -> None:
        before = self._plans[:, site]
        self._covariance = self._changed(site)[self._index, methods]
        c = self._c_of[site].T[methods]
        self._total += c - self._c[site]
        self._c[site] = c
        self._counts[self._index, before] -= 1
        self._counts[self._index, methods] += 1
        self._prior_sum = self._prior_sum + self._prior[site, methods] - self._prior[site, before]
        self._plans[:, site] = methods

    def _changed(self, site: int) -> Floats:
        """Return the covariance after each change of one site, (S, K, n)."""
        c = self._c[site]
        slope = self._own[site] + self._every * (self._total - c)
        if site:
            slope = slope + self._pairs * self._c[site - 1]
        if site + 1 < len(self._c):
            slope = slope + self._pairs * self._c[site + 1]
        counts = self._shared * self._of_evaluated.T
        fixed = self._covariance - c * slope - counts[self._plans[:, site]]
        return np.asarray(fixed[:, None] + self._c_of[site].T * slope[:, None] + counts)


class Climb:
    """The search for the plan that promises most among plans not seen yet.

    Args:
        space: which methods each site may have.
        goals: the objectives.
        promise: what is expected of them as one number.
        ceilings: what plans must keep to.
        seen: plans that are not proposed.

    """

    def __init__(
        self,
        space: Space,
        goals: Sequence[Goal],
        promise: Acquisition,
        ceilings: Ceilings,
        seen: Set[tuple[int, ...]],
    ) -> None:
        self._space, self._goals, self._promise = space, goals, promise
        self._ceilings, self._seen = ceilings, seen

    def best_of(self, plans: Plans, count: int) -> list[Plans]:
        """Return the evaluated plans that promise most."""
        scores = self._promise([goal.model.predict(plans) for goal in self._goals])
        return [plans[i] for i in np.argsort(-scores, kind="stable")[:count]]

    def climb(self, starts: Sequence[Plans], rng: np.random.Generator) -> Plans:
        """Return the best unseen plan that changes of one site reach from any start.

        If a plan under the ceilings was not seen, it is one of these; else any other that was not seen.
        """
        plans = np.array([self._ceilings.near(plan) for plan in starts])
        walks = [goal.walk(plans) for goal in self._goals]
        scores = np.full((len(plans), *self._space.allowed.shape), -np.inf)
        rows = np.arange(len(plans))
        for sweep in range(_SWEEPS):
            moved = False
            for site in rng.permutation(self._space.sites):
                now = self._promise([walk.changes(site) for walk in walks])
                now = np.where(self._ceilings.permitted(plans, site), now, -np.inf)
                scores[:, site] = now
                best = now.argmax(1)
                better = now[rows, best] > now[rows, plans[:, site]] + 1e-9
                # The last sweep only looks: what it sees belongs to the plans it ends with.
                if better.any() and sweep < _SWEEPS - 1:
                    moved = True
                    chosen = np.where(better, best, plans[:, site])
                    for walk in walks:
                        walk.set(site, chosen)
                    plans[:, site] = chosen
            if not moved:
                break
        return self._unseen(plans, scores, rng)

    def _unseen(self, plans: Plans, scores: Floats, rng: np.random.Generator) -> Plans:
        for flat in np.argsort(-scores, axis=None, kind="stable"):
            if not np.isfinite(scores.flat[flat]):
                break
            start, site, method = np.unravel_index(flat, scores.shape)
            plan = plans[start].copy()
            plan[site] = method
            if tuple(plan) not in self._seen:
                return plan
        # Every plan near the ends was seen.
        return self._ceilings.another(self._seen, rng)
