"""Whitening: the layer before a site brings its output to mean 0 and variance 1 by the trained statistics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from normsearch.methods.base import TrainedNorm
from normsearch.methods.upstream import fold_into, foldable
from normsearch.sites import NormSite


def whitened(
    site: NormSite, old: TrainedNorm, producer: nn.Module | None
) -> tuple[TrainedNorm, nn.Module | None]:
    """Return the BatchNorm that fits whitened inputs, and the new producer that makes them.

    The producer's weight and bias take (x − μ)/√(σ² + eps) over; what is left has μ' = 0, σ'² = σ²/(σ² + eps)
    and the same γ and β. Statistics of a group of whitened channels are close to those of each, so a method
    that folds them keeps more of the function. Where the layer is untrained, or no producer may take a scale
    over, ``old`` stays as it is and the producer is None.
    """
    if producer is None or not foldable(site) or not old.trained:
        return old, None
    mean, variance = old.statistics()
    scale = (variance + old.eps).rsqrt()
    left = variance * scale.square()
    # γ as it has to be for BatchNorm to scale by γ, not by γ/√(σ'² + eps), which differs in the last digits.
    ones = torch.ones_like(left) if old.weight is None else old.weight.detach().double()
    trainable = old.trainable if old.weight is None else old.weight.requires_grad
    gamma = nn.Parameter((ones * (left + old.eps).sqrt()).to(**old.factory), requires_grad=trainable)
    centre, spread = (part.to(**old.factory) for part in (torch.zeros_like(left), left))
    fitting = replace(old, weight=gamma, running_mean=centre, running_var=spread)
    return fitting, fold_into(producer, old, scale, -mean * scale)


def whitening_note(site: NormSite) -> str:
    """Say where the input is whitened, or why it is not."""
    if site.trained is False:
        return "not whitened: untrained"
    if site.producer is None:
        return "not whitened: no convolution or linear layer is known to feed it"
    if foldable(site):
        return f"its input is whitened in {site.producer.path}"
    return f"not whitened: {site.producer.path}: {site.producer.detail}"
