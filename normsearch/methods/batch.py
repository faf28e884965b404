"""BatchNorm itself: the layer stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from normsearch.methods.base import Built, Method, TrainedNorm
from normsearch.sites import NormSite

_LAYERS: dict[tuple[int, ...], type[nn.Module]] = {
    (2, 3): nn.BatchNorm1d,
    (4,): nn.BatchNorm2d,
    (5,): nn.BatchNorm3d,
}


@dataclass(frozen=True)
class Batch(Method):
    """Keep the layer that stands there."""

    name = "batch"
    title = "Batch Normalization"
    citation = "Ioffe and Szegedy, 2015, arXiv:1502.03167"
    batch_independent = False
    carries_parameters = True
    carries_statistics = True

    @property
    def exact(self) -> bool:
        """Nothing changes."""
        return True

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say what makes other methods refuse the site: left as it is, it still does what is said there."""
        return () if site.detail is None else (site.detail,)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a new BatchNorm with the same numbers; ``convert`` itself leaves these sites untouched."""
        options = (old.eps, old.momentum, old.has_affine, site.track_running_stats)
        layer_type = _LAYERS.get(site.ranks, nn.SyncBatchNorm)
        layer = layer_type(old.channels, *options, **old.factory)
        old.carry(layer)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            value, own = getattr(old, name), getattr(layer, name)
            if value is not None and own is not None:
                own.copy_(value)
        return Built(layer)
