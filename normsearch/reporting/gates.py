"""What the layers that mix normalizations have learned: ρ of batch-instance, the weights of switchable."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normsearch.methods import BatchInstanceNorm, SparseSwitchableNorm, SwitchableNorm
from normsearch.reporting.sections import Gate, Gates, Mixture

_BINS = 10


def gates_of(model: nn.Module, sites: Iterable[str]) -> Gates | None:
    """Read every layer that mixes, at the sites of a model; None without any."""
    mixtures, gates = [], []
    for site in sites:
        try:
            at = model.get_submodule(site)
        except AttributeError:
            continue
        # Fused norm and activation layers have the norm inside.
        for layer in at.modules():
            if isinstance(layer, SwitchableNorm | SparseSwitchableNorm):
                mean, variance = (_shares(part) for part in layer.mixtures(torch.float64))
                mixtures.append(Mixture(site=site, mean=mean, variance=variance))
            if isinstance(layer, BatchInstanceNorm):
                gates.append(_gate(site, layer.rho.detach().double().clamp(0, 1)))
    return Gates(mixtures=tuple(mixtures), gates=tuple(gates)) if mixtures or gates else None


def _shares(weights: Tensor) -> tuple[float, float, float]:
    instance, layer, batch = weights.detach().tolist()
    return instance, layer, batch


def _gate(site: str, rho: Tensor) -> Gate:
    counts = torch.histc(rho.float().cpu(), _BINS, 0, 1).int().tolist()
    return Gate(
        site=site,
        channels=rho.numel(),
        mean=float(rho.mean()),
        least=float(rho.min()),
        most=float(rho.max()),
        histogram=tuple(counts),
    )
