"""Instance normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from normsearch.methods.base import Built, ElementGuard, Method, Refusal, TrainedNorm
from normsearch.methods.group import affine_note
from normsearch.sites import NormSite

_LAYERS: dict[int, type[nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d]] = {
    3: nn.InstanceNorm1d,
    4: nn.InstanceNorm2d,
    5: nn.InstanceNorm3d,
}


@dataclass(frozen=True)
class Instance(Method):
    """Normalize each channel of each sample over space; torch's own ``nn.InstanceNorm1d/2d/3d``.

    Where the number of dimensions is not known it is ``nn.GroupNorm`` with one channel per group, the same
    function.
    """

    name = "instance"
    title = "Instance Normalization"
    citation = "Ulyanov et al., 2016, arXiv:1607.08022"
    batch_independent = True

    @property
    def exact(self) -> bool:
        """Statistics of a sample replace those of the training set."""
        return False

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse maps of one element and inputs without space: the output would be β."""
        if site.fewest_elements == 1:
            flat = any(len(shape) == 2 for shape in site.input_shapes)
            what = "an input (N, C) has no space" if flat else "a map of one element"
            return self.refuse(
                site,
                f"{what} to normalize over, the output would be constant",
                "choose group, layer or frozen",
            )
        return None

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added, and where the shape is not known."""
        if site.fewest_elements is None:
            return (*affine_note(site), "the input's shape is unknown: checked at run time")
        return affine_note(site)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return torch's instance norm, in which a sample's statistics stand for the running ones."""
        ranks = {len(shape) for shape in site.input_shapes} or set(site.ranks) - {2}
        layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d | nn.GroupNorm
        if len(ranks) == 1:
            layer = _LAYERS[ranks.pop()](old.channels, eps=old.eps, affine=False, **old.factory)
        else:
            layer = nn.GroupNorm(old.channels, old.channels, old.eps, affine=False, **old.factory)
        if old.needs_affine:
            layer.affine = True
            old.fold(layer, *old.statistics())
        # torch's InstanceNorm1d reads (N, C) as one unbatched (C, L): guard it where (N, C) may come.
        if site.fewest_elements is None or 2 in site.ranks:
            layer.register_forward_pre_hook(ElementGuard(site.path, str(self), 1))
        return Built(layer)
