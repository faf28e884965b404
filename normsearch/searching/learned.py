"""Plans that a network has learned: the gates of batch-instance and switchable layers, read as choices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from normsearch.methods import BatchInstanceNorm, SparseSwitchableNorm, SwitchableNorm, parse_method
from normsearch.plans import Plan
from normsearch.searching.space import SearchSpace


def learned_params(model: nn.Module, plan: Plan, space: SearchSpace) -> dict[str, str] | None:
    """Return the parameters that a trained network's gates stand for; None without any gate.

    A batch-instance layer becomes ``batch`` where its mean ρ is ½ or more, else ``instance``; a switchable
    layer becomes the one of instance, layer and batch with the largest weight, means and variances taken
    together. Where the space does not offer that at a site, the next one counts; sites without gates keep
    what they have.

    Args:
        model: the trained network, converted by ``plan``.
        plan: which method stands where.
        space: what is searched.

    """
    found: dict[str, str] = {}
    gated = False
    for path, spellings in space.allowed.items():
        by_name = {parse_method(spelling).name: spelling for spelling in reversed(spellings)}
        weights = _weights(model.get_submodule(path))
        gated = gated or weights is not None
        if weights is None:
            weights = {plan[path].name: 1.0}
        ranked = sorted(weights, key=lambda name: -weights[name])
        found[path] = next((by_name[name] for name in ranked if name in by_name), spellings[0])
    return space.params(found) if gated else None


def _weights(at: nn.Module) -> Mapping[str, float] | None:
    # Fused norm and activation layers have the norm inside.
    for layer in at.modules():
        if isinstance(layer, BatchInstanceNorm):
            rho = float(layer.rho.detach().double().clamp(0, 1).mean())
            return {"batch": rho, "instance": 1 - rho}
        if isinstance(layer, SwitchableNorm | SparseSwitchableNorm):
            mean, variance = (part.detach() for part in layer.mixtures(torch.float64))
            instance, whole, batch = (mean + variance).tolist()
            return {"instance": instance, "layer": whole, "batch": batch}
    return None
