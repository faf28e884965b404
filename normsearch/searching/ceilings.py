"""Ceilings: which plans keep to limits on known sums."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
from numpy.typing import NDArray

from normsearch.searching.surrogate import Floats, Plans, Space

#: With several ceilings it may take long to know that no plan is left: nobody waits longer than this.
_VISITS = 100_000


class Ceilings:
    """Known sums over sites, each with the largest value that a plan may have.

    Args:
        space: which methods each site may have.
        tables: what each method adds at each site to each sum, (C, L, K).
        limits: the largest sums, (C,).

    """

    def __init__(self, space: Space, tables: Floats, limits: Floats) -> None:
        self._space, self._limits = space, limits
        # What may not stand at a site never makes a sum smaller.
        self._tables = np.where(space.allowed, tables, np.inf)
        least = self._tables.min(2)
        self._least_after = np.concatenate([least[:, ::-1].cumsum(1)[:, ::-1], np.zeros((len(limits), 1))], 1)

    def permitted(self, plans: Plans, site: int) -> NDArray[np.bool_]:
        """Return which methods plans (S, L) may have at one site, all else as it is, (S, K)."""
        others = self._sums(plans) - self._tables[:, site, plans[:, site]]
        changed = others[:, :, None] + self._tables[:, site, None]
        return np.asarray((changed <= self._limits[:, None, None]).all(0) & self._space.allowed[site])

    def permit(self, plan: Plans) -> bool:
        """Whether a plan keeps to all ceilings."""
        return bool((self._sums(plan[None])[:, 0] <= self._limits).all())

    def near(self, plan: Plans) -> Plans:
        """Return a plan under the ceilings that differs at few sites, if changes one by one find it."""
        plan, sites = plan.copy(), np.arange(self._space.sites)
        scale = np.maximum(np.abs(self._limits - self._least_after[:, 0]), 1e-12)[:, None, None]
        while not self.permit(plan):
            changed = (
                self._sums(plan[None])[:, :, None] - self._tables[:, sites, plan][:, :, None] + self._tables
            )
            over = (np.maximum(changed - self._limits[:, None, None], 0.0) / scale).sum(0)
            site, method = np.unravel_index(over.argmin(), over.shape)
            if over[site, method] >= over[site, plan[site]]:
                break
            plan[site] = method
        return plan

    def unseen(self, seen: Set[tuple[int, ...]], rng: np.random.Generator) -> Plans | None:
        """Return a plan under the ceilings that was not seen; None if there is none.

        Where it is known that what is left to choose cannot stay below a ceiling, nothing is looked at. With
        one ceiling no step is in vain; with several the search is given up after many steps.
        """
        orders = [rng.permutation(np.flatnonzero(row)) for row in self._space.allowed]
        stack: list[tuple[tuple[int, ...], Floats]] = [((), np.zeros(len(self._limits)))]
        for _ in range(_VISITS):
            if not stack:
                break
            plan, sums = stack.pop()
            site = len(plan)
            if site == self._space.sites:
                if plan not in seen:
                    return np.array(plan)
                continue
            for method in orders[site]:
                total = sums + self._tables[:, site, method]
                if (total + self._least_after[:, site + 1] <= self._limits).all():
                    stack.append(((*plan, int(method)), total))
        return None

    def another(self, seen: Set[tuple[int, ...]], rng: np.random.Generator) -> Plans:
        """Return an unseen plan under the ceilings; else any unseen one, a seen one under them, or any."""
        unbound = Ceilings(self._space, self._tables[:0], self._limits[:0])
        for ceilings, known in ((self, seen), (unbound, seen), (self, frozenset[tuple[int, ...]]())):
            found = ceilings.unseen(known, rng)
            if found is not None:
                return found
        return self._space.random(rng)

    def _sums(self, plans: Plans) -> Floats:
        """Return every sum of every plan, (C, S)."""
        return np.asarray(self._tables[:, np.arange(self._space.sites), plans].sum(2))
