"""A Gaussian process over plans: what is known about every assignment of methods to sites.

A plan x gives site l the method x_l out of K_l. With c_l(x, x') = (1[x_l = x'_l] − 1/K_l) / (1 − 1/K_l),
which is one where two plans agree at a site and averages to zero over random plans, the covariance is a
sum of variance components, each of mean one on the diagonal:

    shared   Σ_{l,m} (1[x_l = x'_m] − 1/K) / (L (1 − 1/K))  a method's effect that all sites share
    sites    Σ_l w_l c_l                                  each site's own effects, by its relevance w_l
    pairs    Σ_l c_l c_{l+1} / (L − 1)                    neighbours in data order
    any      Σ_{l<m} c_l c_m / (L (L − 1) / 2)            any two sites
    noise    1[same evaluation]

Components and relevances are fitted by the marginal likelihood with weak inverse-gamma priors, by the
monotone multiplicative updates of Zhou et al., 2019, "MM algorithms for variance components models".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Plans = NDArray[np.int64]

#: What shared, sites, pairs, any and noise explain of a standardized score before there is data.
_EXPECTED = np.array([0.3, 0.4, 0.1, 0.1, 0.1])
#: How many observations that expectation counts for.
_STRENGTH = 6.0
#: The same for a site's share of the sites' component.
_SITE_STRENGTH = 4.0
_UPDATES = 15
#: A prior's slope before there is data, in standard deviations of the score per one of the prior, and its
#: precision.
_SLOPE, _SLOPE_PRECISION = 0.4, 8.0


@dataclass(frozen=True)
class Space:
    """The methods that each site may have.

    Attributes:
        allowed: (L, K), whether site l may have method k of all those named anywhere.

    """

    allowed: NDArray[np.bool_]

    @property
    def sites(self) -> int:
        """Number of sites L."""
        return int(self.allowed.shape[0])

    @property
    def methods(self) -> int:
        """Number of methods K over all sites."""
        return int(self.allowed.shape[1])

    @property
    def chance(self) -> Floats:
        """Chance that two random plans agree, per site: 1/K_l."""
        return np.asarray(1.0 / self.allowed.sum(1))

    def random(self, rng: np.random.Generator) -> Plans:
        """Return a random plan."""
        return np.array([rng.choice(np.flatnonzero(row)) for row in self.allowed])


class PlanSurrogate:
    """A Gaussian process fitted to evaluated plans; predicts scores of others.

    Args:
        space: which methods each site may have.
        plans: evaluated plans, (n, L) method numbers.
        scores: their scores, (n,); larger is better or worse, as the caller likes.
        prior: expected contribution of each method at each site, (L, K), up to scale and sign: it is the mean
            of the process times a slope that is fitted, and never negative; None for none.

    """

    def __init__(self, space: Space, plans: Plans, scores: Floats, prior: Floats | None = None) -> None:
        self._space, self._plans = space, plans
        self._centre, self._scale = float(scores.mean()), float(scores.std()) or 1.0
        self._z = (scores - self._centre) / self._scale
        self._prior = None if prior is None else _standardized(prior, space)
        self._expected_of_prior = self._prior_mean(plans)
        agreement = _agreement(space, plans, plans)
        self._variances, self._relevance = self._fit(agreement)
        grams = self._grams(agreement, self._counts(plans, plans))
        covariance = np.tensordot(self._variances[:4], grams, 1) + self._variances[4] * np.eye(len(plans))
        self._inverse = np.linalg.inv(covariance)
        self._mean, self._slope = self._trend(self._inverse)
        self._weights = self._inverse @ (self._z - self._mean - self._slope * self._expected_of_prior)

    @property
    def slope(self) -> float:
        """How much of the prior the evaluated plans confirm, in standard deviations of the score."""
        return self._slope

    @property
    def variances(self) -> Floats:
        """What shared, sites, pairs, any and noise explain, in parts of the score's variance."""
        return self._variances

    @property
    def relevance(self) -> Floats:
        """Each site's weight w_l; they average to one."""
        return self._relevance * self._space.sites

    def predict(self, plans: Plans) -> tuple[Floats, Floats]:
        """Return expected scores and their standard deviations (without noise), (m,) each."""
        cross = self._cross(_agreement(self._space, plans, self._plans), self._counts(plans, self._plans))
        variance = self._prior_variance(self._own_counts(plans)) - ((cross @ self._inverse) * cross).sum(1)
        expected = self._mean + self._slope * self._prior_mean(plans) + cross @ self._weights
        return (
            self._centre + self._scale * expected,
            self._scale * np.sqrt(np.maximum(variance, 1e-12)),
        )

    def neighbours(self, plan: Plans) -> tuple[Floats, Floats]:
        """Return ``predict`` for every change of one site: (L, K) each, entry (l, k) for method k at site l.

        Costs what its few numbers need: agreements change by one site only.
        """
        space, plans = self._space, self._plans
        sites, methods = space.sites, space.methods
        centred = _agreement(space, plan[None], plans)[0]
        onehot = plans[:, :, None] == np.arange(methods)
        chance = space.chance
        changed = (onehot - chance[None, :, None]) / (1 - chance)[None, :, None]
        # c of the plan after setting site l to k, minus before: (n, L, K).
        step = changed - centred[:, :, None]
        weighted = centred @ self._relevance
        total, squares = centred.sum(1), np.square(centred).sum(1)
        adjacent = (centred[:, :-1] * centred[:, 1:]).sum(1)
        beside = np.zeros_like(centred)
        beside[:, 1:] += centred[:, :-1]
        beside[:, :-1] += centred[:, 1:]
        totals = total[:, None, None] + step
        pair_sum = np.square(totals) - (
            squares[:, None, None] + np.square(changed) - np.square(centred)[:, :, None]
        )
        counts = _histogram(plan[None], methods)[0]
        of_plans = _histogram(plans, methods)
        base = of_plans @ counts
        moved = of_plans[:, None, :] - of_plans[np.arange(len(plans))[:, None], plan[None]][:, :, None]
        grams = (
            ((base[:, None, None] + moved) / sites - sites / methods) / (1 - 1 / methods),
            weighted[:, None, None] + step * self._relevance[None, :, None],
            (adjacent[:, None, None] + step * beside[:, :, None]) / max(sites - 1, 1),
            pair_sum / max(sites * (sites - 1), 1),
        )
        cross = sum(v * g for v, g in zip(self._variances, grams, strict=False))
        assert isinstance(cross, np.ndarray)
        flat = cross.reshape(len(plans), -1)
        own = np.square(counts).sum() + 2 * (counts[None, :] - counts[plan][:, None] + 1)
        own = own - 2 * (np.arange(methods)[None] == plan[:, None])
        variance = self._prior_variance(own.reshape(-1)) - (flat * (self._inverse @ flat)).sum(0)
        expected = self._mean + (self._weights @ flat).reshape(sites, methods)
        if self._prior is not None:
            now = self._prior[np.arange(sites), plan]
            expected = expected + self._slope * (now.sum() + self._prior - now[:, None])
        return (
            self._centre + self._scale * expected,
            self._scale * np.sqrt(np.maximum(variance, 1e-12)).reshape(sites, methods),
        )

    def _fit(self, agreement: Floats) -> tuple[Floats, Floats]:
        """Return the five variances and the sites' relevances, the latter with sum one."""
        n, sites = len(self._z), self._space.sites
        counts = self._counts(self._plans, self._plans)
        relevance = np.full(sites, 1.0 / sites)
        variances = _EXPECTED.copy()
        by_site = np.moveaxis(agreement, 2, 0)
        flat_sites = by_site.reshape(sites, -1)
        for _ in range(_UPDATES):
            grams = np.concatenate([_grams(agreement, counts, relevance), np.eye(n)[None]])
            inverse = np.linalg.inv(np.tensordot(variances, grams, 1))
            mean, slope = self._trend(inverse)
            weights = inverse @ (self._z - mean - slope * self._expected_of_prior)
            # gradient of the log likelihood: ½ (explained − accounted)
            outer = np.outer(weights, weights)
            explained = np.tensordot(grams, outer, 2)
            accounted = np.tensordot(grams, inverse, 2)
            variances = variances * np.sqrt(
                (explained + _STRENGTH * _EXPECTED / variances**2) / (accounted + _STRENGTH / variances)
            )
            own = variances[1] * relevance
            expected = variances[1] / sites
            gain = np.maximum(flat_sites @ outer.reshape(-1), 0)
            cost = flat_sites @ inverse.reshape(-1)
            own = own * np.sqrt(
                (gain + _SITE_STRENGTH * expected / own**2) / (np.maximum(cost, 0) + _SITE_STRENGTH / own)
            )
            relevance = own / own.sum()
        return variances, relevance

    def _trend(self, inverse: Floats) -> tuple[float, float]:
        """Return the mean and the prior's slope by generalized least squares, the slope shrunk and ≥ 0."""
        ones = np.ones(len(self._z))
        row = ones @ inverse
        if self._prior is None:
            return float(row @ self._z / row.sum()), 0.0
        p = self._expected_of_prior
        # The mean is fitted exactly, the slope with its own expectation.
        centre_p, centre_z = float(row @ p / row.sum()), float(row @ self._z / row.sum())
        p, z = p - centre_p, self._z - centre_z
        at = p @ inverse
        slope = max(0.0, float((at @ z + _SLOPE * _SLOPE_PRECISION) / (at @ p + _SLOPE_PRECISION)))
        return centre_z - slope * centre_p, slope

    def _prior_mean(self, plans: Plans) -> Floats:
        if self._prior is None:
            return np.zeros(len(plans))
        return np.asarray(self._prior[np.arange(self._space.sites), plans].sum(1))

    def _counts(self, first: Plans, second: Plans) -> Floats:
        """Return the shared component's Gram matrix."""
        sites, methods = self._space.sites, self._space.methods
        together = _histogram(first, methods) @ _histogram(second, methods).T
        return np.asarray((together / sites - sites / methods) / (1 - 1 / methods))

    def _own_counts(self, plans: Plans) -> Floats:
        return np.asarray(np.square(_histogram(plans, self._space.methods)).sum(1))

    def _prior_variance(self, squared_counts: Floats) -> Floats:
        sites, methods = self._space.sites, self._space.methods
        shared = (squared_counts / sites - sites / methods) / (1 - 1 / methods)
        return np.asarray(self._variances[0] * shared + self._variances[1:4].sum())

    def _grams(self, agreement: Floats, counts: Floats) -> Floats:
        return _grams(agreement, counts, self._relevance)

    def _cross(self, agreement: Floats, counts: Floats) -> Floats:
        return np.asarray(np.tensordot(self._variances[:4], self._grams(agreement, counts), 1))


def _agreement(space: Space, first: Plans, second: Plans) -> Floats:
    """Return c_l for every two plans, (m, n, L)."""
    chance = space.chance
    return np.asarray(((first[:, None] == second[None]) - chance) / (1 - chance))


def _grams(agreement: Floats, counts: Floats, relevance: Floats) -> Floats:
    """Return the four Gram matrices, (4, m, n)."""
    sites = agreement.shape[2]
    total = agreement.sum(2)
    pairs = (agreement[..., :-1] * agreement[..., 1:]).sum(2) / max(sites - 1, 1)
    every = (np.square(total) - np.square(agreement).sum(2)) / max(sites * (sites - 1), 1)
    return np.stack([counts, agreement @ relevance, pairs, every])


def _histogram(plans: Plans, methods: int) -> Floats:
    """Return how often each plan has each method, (n, K)."""
    return np.asarray((plans[:, :, None] == np.arange(methods)).sum(1), dtype=np.float64)


def _standardized(prior: Floats, space: Space) -> Floats:
    """Return the prior with mean zero at each site and standard deviation one over random plans."""
    shown = np.where(space.allowed, prior, np.nan)
    centred = prior - np.nanmean(shown, axis=1, keepdims=True)
    spread = np.sqrt(np.nanvar(shown, axis=1).sum())
    return np.where(space.allowed, centred / (spread or 1.0), 0.0)
