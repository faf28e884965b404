"""What does a plan promise? Acquisition functions: of expected scores and deviations, one number each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from normsearch.searching.surrogate import Floats

#: Means and deviations of each objective, larger is better: what is expected of some plans.
Predictions = Sequence[tuple[Floats, Floats]]
#: Predictions in, promises of the same shape out.
Acquisition = Callable[[Predictions], Floats]


def upper_bound(hope: float) -> Acquisition:
    """Return mean + hope·deviation of the only objective."""

    def promise(predictions: Predictions) -> Floats:
        mean, deviation = predictions[0]
        return np.asarray(mean + hope * deviation)

    return promise


def scalarisation(values: Sequence[Floats], weights: Floats, hope: float) -> Acquisition:
    """Return the augmented Chebyshev scalarisation of upper bounds, scaled by what was seen.

    It reaches concave parts of a front, which a weighted sum does not.

    Args:
        values: what was seen of each objective.
        weights: of the objectives.
        hope: standard deviations.

    """

    def promise(predictions: Predictions) -> Floats:
        parts = []
        for seen, weight, (mean, deviation) in zip(values, weights, predictions, strict=True):
            low, high = float(seen.min()), float(seen.max())
            parts.append(weight * (mean + hope * deviation - low) / ((high - low) or 1.0))
        stacked = np.stack(parts)
        return np.asarray(stacked.min(0) + 0.05 * stacked.sum(0))

    return promise


def hypervolume_improvement(
    scores: Floats, known: Floats, corner: tuple[float, float], *, uncertain: int
) -> Acquisition:
    """Return by how much a plan is expected to enlarge the area that evaluated ones dominate.

    One of the two objectives is known of every plan, so that the expectation is a sum over the steps of the
    front: Σ_j |(lo_j, hi_j) ∩ (corner, known)| · E[max(score − S_j, 0)], S_j being the best score where the
    other objective is worth between lo_j and hi_j.

    Args:
        scores: expected scores of the plans to improve on, (n,).
        known: their known objective, (n,).
        corner: the score and the known objective below which nothing counts.
        uncertain: which of the two objectives is the score.

    Source: Emmerich et al., 2011, "Hypervolume-based expected improvement", for two uncertain objectives.

    """
    levels, ends = [corner[0]], [np.inf]
    for at in np.lexsort((-scores, -known)):
        if scores[at] > levels[-1] and known[at] > corner[1]:
            levels.append(float(scores[at]))
            ends.append(float(known[at]))
    steps, high, low = np.array(levels), np.array(ends), np.array([*ends[1:], corner[1]])

    def promise(predictions: Predictions) -> Floats:
        (mean, deviation), (other, _) = predictions[uncertain], predictions[1 - uncertain]
        widths = np.maximum(np.minimum(high, other[..., None]) - low, 0.0)
        gains = expected_improvement(mean[..., None], deviation[..., None], steps)
        return np.asarray((widths * gains).sum(-1))

    return promise


def expected_improvement(mean: Floats, deviation: Floats, level: Floats) -> Floats:
    """Return E[max(y − level, 0)] of a normal y."""
    z = (mean - level) / deviation
    density = np.exp(-np.square(z) / 2) / np.sqrt(2 * np.pi)
    return np.asarray(deviation * (density + z * torch.special.ndtr(torch.from_numpy(z)).numpy()))
