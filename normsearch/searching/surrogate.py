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
#: In the distances of quartiles: bad plans of healthy networks are up to 75 below.
_FAR = 100.0
#: Variances are fitted to so many of the plans at most, spread over all: more change them little.
_FITTED = 120
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

    @property
    def agreeing(self) -> tuple[Floats, Floats]:
        """c_l of two plans that differ at site l, and how much more it is where they agree, (L,) each."""
        chance = self.chance
        return -chance / (1 - chance), 1 / (1 - chance)

    def onehot(self, plans: Plans) -> Floats:
        """Return which method each plan has where, (n, L, K)."""
        return np.asarray(plans[:, :, None] == np.arange(self.methods), dtype=np.float64)

    def random(self, rng: np.random.Generator) -> Plans:
        """Return a random plan."""
        return np.array([rng.choice(np.flatnonzero(row)) for row in self.allowed])


def without_outliers(scores: Floats) -> Floats:
    """Return scores, larger being better, with those far below all others as bad as the worst of these.

    The loss of a network that diverged would else be most of the scores' variance. Far is a hundred times
    the distance of the quartiles below the first.
    """
    low, high = np.quantile(scores, [0.25, 0.75])
    kept = scores >= low - _FAR * (high - low)
    return np.where(kept | (low == high), scores, scores[kept].min())


class PlanSurrogate:
    """A Gaussian process fitted to evaluated plans; predicts scores of others.

    Args:
        space: which methods each site may have.
        plans: evaluated plans, (n, L) method numbers.
        scores: their scores, (n,); larger is better or worse, as the caller likes.
        prior: expected contribution of each method at each site, (L, K), up to scale and sign: it is the mean
            of the process times a slope that is fitted, and never negative; None for none.
        like: take variances and relevances from this one instead of fitting them.

    """

    def __init__(
        self,
        space: Space,
        plans: Plans,
        scores: Floats,
        prior: Floats | None = None,
        *,
        like: PlanSurrogate | None = None,
    ) -> None:
        self.space, self.plans = space, plans
        self._centre, self._scale = float(scores.mean()), float(scores.std()) or 1.0
        self._z = (scores - self._centre) / self._scale
        self._prior = np.zeros((0, *space.allowed.shape)) if prior is None else _parts(prior, space)
        self._expected_of_prior = self.prior_mean(plans)
        fixed = _fixed_grams(space, plans, plans)
        if like is None:
            rows = np.linspace(0, len(plans) - 1, min(len(plans), _FITTED)).astype(int)
            self._variances, self._relevance = self._fit(rows, fixed[:, rows][:, :, rows])
        else:
            self._variances, self._relevance = like._variances, like._relevance
        covariance = self._combined(fixed, plans) + self._variances[4] * np.eye(len(plans))
        self.inverse = np.linalg.inv(covariance)
        self._mean, self._slopes = _trend(self.inverse, self._z, self._expected_of_prior)
        self.weights = self.inverse @ (self._z - self._mean - self._slopes @ self._expected_of_prior)

    @property
    def slopes(self) -> Floats:
        """How much of the prior's shared and own parts the plans confirm, in deviations of the score."""
        return self._slopes

    @property
    def variances(self) -> Floats:
        """What shared, sites, pairs, any and noise explain, in parts of the score's variance."""
        return self._variances

    @property
    def relevance(self) -> Floats:
        """Each site's weight w_l; they average to one."""
        return self._relevance * self.space.sites

    def predict(self, plans: Plans) -> tuple[Floats, Floats]:
        """Return expected scores and their standard deviations (without noise), (m,) each."""
        cross = self.covariance(plans)
        squares = np.square(_histogram(plans, self.space.methods)).sum(1)
        variance = self.variance(squares) - ((cross @ self.inverse) * cross).sum(1)
        return self.scores(self._slopes @ self.prior_mean(plans) + cross @ self.weights, variance)

    def scores(self, expected: Floats, variance: Floats) -> tuple[Floats, Floats]:
        """Return means and deviations in units of the scores, from those of standardized ones."""
        mean = self._centre + self._scale * (self._mean + expected)
        return mean, self._scale * np.sqrt(np.maximum(variance, 1e-12))

    def covariance(self, plans: Plans) -> Floats:
        """Return the covariance of plans with the evaluated ones, (m, n)."""
        return self._combined(_fixed_grams(self.space, plans, self.plans), plans)

    def variance(self, squared_counts: Floats) -> Floats:
        """Return plans' variance before data, from the sum of squares of how often each method stands."""
        sites, methods = self.space.sites, self.space.methods
        shared = (squared_counts / sites - sites / methods) / (1 - 1 / methods)
        return np.asarray(self._variances[0] * shared + self._variances[1:4].sum())

    def prior_mean(self, plans: Plans) -> Floats:
        """Return the sums of the prior's parts, (0 or 2, m)."""
        return np.asarray(self._prior[:, np.arange(self.space.sites), plans].sum(2))

    @property
    def sloped_prior(self) -> Floats:
        """What the prior adds to the mean for each choice, (L, K)."""
        return np.tensordot(self._slopes, self._prior, 1)

    def _combined(self, fixed: Floats, plans: Plans) -> Floats:
        own = _own_gram(self.space, plans, self.plans, self._relevance)
        shared, pairs, every = fixed
        parts = zip(self._variances[:4], (shared, own, pairs, every), strict=True)
        return np.asarray(sum(variance * gram for variance, gram in parts))

    def _fit(self, rows: Plans, fixed: Floats) -> tuple[Floats, Floats]:
        """Return the five variances and the sites' relevances, the latter with sum one."""
        n, sites = len(rows), self.space.sites
        z, expected_of_prior = self._z[rows], self._expected_of_prior[:, rows]
        low, rise = self.space.agreeing
        flat = self.space.onehot(self.plans[rows]).reshape(n, -1)
        shared, pairs, every = fixed
        grams = np.stack([shared, np.empty((n, n)), pairs, every, np.eye(n)])
        relevance = np.full(sites, 1.0 / sites)
        variances = _EXPECTED.copy()
        for _ in range(_UPDATES):
            grams[1] = flat @ (flat * np.repeat(rise * relevance, self.space.methods)).T + low @ relevance
            inverse = np.linalg.inv((variances @ grams.reshape(5, -1)).reshape(n, n))
            mean, slopes = _trend(inverse, z, expected_of_prior)
            weights = inverse @ (z - mean - slopes @ expected_of_prior)
            # gradient of the log likelihood: ½ (explained − accounted)
            explained = (grams @ weights) @ weights
            accounted = grams.reshape(5, -1) @ inverse.reshape(-1)
            # The same for each site's C_l = low_l + rise_l Σ_k h_lk h_lkᵀ.
            of_sites = low * weights.sum() ** 2 + rise * np.square(weights @ flat).reshape(sites, -1).sum(1)
            through = (flat * (inverse @ flat)).sum(0).reshape(sites, -1).sum(1)
            cost = low * inverse.sum() + rise * through
            variances = variances * np.sqrt(
                (explained + _STRENGTH * _EXPECTED / variances**2) / (accounted + _STRENGTH / variances)
            )
            own = variances[1] * relevance
            expected = variances[1] / sites
            own = own * np.sqrt(
                (np.maximum(of_sites, 0) + _SITE_STRENGTH * expected / own**2)
                / (np.maximum(cost, 0) + _SITE_STRENGTH / own)
            )
            relevance = own / own.sum()
        return variances, relevance


def _trend(inverse: Floats, z: Floats, parts: Floats) -> tuple[float, Floats]:
    """Return the mean and the slopes of the prior's parts by generalized least squares.

    The mean is fitted exactly; slopes are shrunk to what is expected of them and never negative.
    """
    row = inverse.sum(0)
    level, centres = float(row @ z / row.sum()), parts @ row / row.sum()
    centred = parts - centres[:, None]
    through = centred @ inverse
    normal = through @ centred.T + _SLOPE_PRECISION * np.eye(len(parts))
    wanted = through @ (z - level) + _SLOPE * _SLOPE_PRECISION
    slopes, free = np.zeros(len(parts)), np.ones(len(parts), dtype=bool)
    while free.any():
        slopes = np.zeros(len(parts))
        slopes[free] = np.linalg.solve(normal[np.ix_(free, free)], wanted[free])
        if (slopes >= 0).all():
            break
        free = slopes > 0
    return level - float(np.maximum(slopes, 0) @ centres), np.maximum(slopes, 0)


def _own_gram(space: Space, first: Plans, second: Plans, relevance: Floats) -> Floats:
    """Return Σ_l w_l c_l for every two plans, (m, n), with relevances of sum one."""
    low, gain = space.agreeing
    scaled = space.onehot(first) * (gain * relevance)[:, None]
    flat = space.sites * space.methods
    agreeing = scaled.reshape(-1, flat) @ space.onehot(second).reshape(-1, flat).T
    return np.asarray(agreeing + low @ relevance)


def _fixed_grams(space: Space, first: Plans, second: Plans) -> Floats:
    """Return the Gram matrices that no relevance enters: shared, pairs, any, (3, m, n)."""
    sites, methods = space.sites, space.methods
    together = _histogram(first, methods) @ _histogram(second, methods).T
    shared = (together / sites - sites / methods) / (1 - 1 / methods)
    total, squares, pairs = (np.zeros((len(first), len(second))) for _ in range(3))
    before = None
    # Site by site, which keeps what is worked on in the cache.
    for site, (low, gain) in enumerate(zip(*space.agreeing, strict=True)):
        c = np.where(first[:, site, None] == second[None, :, site], low + gain, low)
        total += c
        squares += c * c
        if before is not None:
            pairs += before * c
        before = c
    every = (np.square(total) - squares) / max(sites * (sites - 1), 1)
    return np.stack([shared, pairs / max(sites - 1, 1), every])


def _histogram(plans: Plans, methods: int) -> Floats:
    """Return how often each plan has each method, (n, K)."""
    return np.asarray((plans[:, :, None] == np.arange(methods)).sum(1), dtype=np.float64)


def _parts(prior: Floats, space: Space) -> Floats:
    """Return the prior's part that all sites share and each site's own, (2, L, K).

    Each has mean zero at each site and standard deviation one over random plans. Errors of a prior average
    out over sites, so that the first is often right where the second is not: each has a slope of its own.
    """
    shared = _centred(prior, space).sum(0) / np.maximum(space.allowed.sum(0), 1)
    shared = _centred(np.tile(shared, (space.sites, 1)), space)
    parts = shared, _centred(prior, space) - shared
    return np.stack([part / (np.sqrt(np.square(part).sum(1) @ space.chance) or 1.0) for part in parts])


def _centred(table: Floats, space: Space) -> Floats:
    """Return a table with mean zero at each site, zero where a method is not allowed."""
    mean = np.where(space.allowed, table, 0.0).sum(1) * space.chance
    return np.where(space.allowed, table - mean[:, None], 0.0)
