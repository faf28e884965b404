"""Group normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError
from normsearch.methods.base import Built, ElementGuard, Method, Refusal, TrainedNorm
from normsearch.sites import NormSite


def group_statistics(old: TrainedNorm, groups: int) -> tuple[Tensor, Tensor]:
    """Expected moments of each channel's group: μ_g = mean μ_c, σ_g² = mean σ_c² + mean (μ_c − μ_g)²."""
    mean, variance = (part.reshape(groups, -1) for part in old.statistics())
    centre = mean.mean(1, keepdim=True)
    spread = variance.mean(1, keepdim=True) + (mean - centre).square().mean(1, keepdim=True)
    return centre.expand_as(mean).reshape(-1), spread.expand_as(mean).reshape(-1)


def build_group_norm(site: NormSite, old: TrainedNorm, groups: int, method: str) -> nn.Module:
    """Return torch's GroupNorm with the trained statistics folded into its affine."""
    layer = nn.GroupNorm(groups, old.channels, old.eps, affine=False, **old.factory)
    if old.needs_affine:
        layer.affine = True
        old.fold(layer, *group_statistics(old, groups))
    size = old.channels // groups
    if size == 1 and site.fewest_elements is None:
        layer.register_forward_pre_hook(ElementGuard(site.path, method, size))
    return layer


@dataclass(frozen=True)
class Group(Method):
    """Normalize each sample over groups of channels and space; torch's own ``nn.GroupNorm``.

    y = γ (x − μ_g) / √(σ_g² + eps) + β, statistics over (C/groups, *spatial) of one sample.

    Args:
        groups: number of groups; a number that does not divide C becomes the largest divisor below it.
            By default the largest divisor of C up to 32 that leaves at least 16 channels per group.

    """

    name = "group"
    title = "Group Normalization"
    citation = "Wu and He, 2018, arXiv:1803.08494"
    batch_independent = True

    groups: int | None = None

    def validate(self) -> None:
        """Check the number of groups."""
        if self.groups is not None and self.groups < 1:
            raise MethodError(f"group(groups={self.groups}): groups must be at least 1")

    @property
    def exact(self) -> bool:
        """Statistics of a sample replace those of the training set."""
        return False

    def resolve(self, site: NormSite) -> Group:
        """Fill in the number of groups."""
        return self if site.channels is None else replace(self, groups=self._groups(site.channels))

    def _groups(self, channels: int) -> int:
        most, least_size = (32, 16) if self.groups is None else (self.groups, 1)
        fitting = [
            g for g in range(1, min(most, channels) + 1) if channels % g == 0 and channels // g >= least_size
        ]
        return max(fitting, default=1)

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse where a group is a single element: the output would be β."""
        if site.channels is None or site.fewest_elements is None:
            return None
        size = site.channels // self._groups(site.channels)
        if size * site.fewest_elements > 1:
            return None
        return self.refuse(
            site,
            f"{size} channel per group on a map of one element leaves one element per group, "
            "whose output would be constant",
            "choose fewer groups, layer or frozen",
        )

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Warn about instance norm in disguise, and say where an affine is added."""
        if site.channels is None:
            return ()
        groups = self._groups(site.channels)
        found = list(affine_note(site))
        if self.groups is not None and groups == site.channels:
            found.append(f"one channel per group: this is instance normalization ({groups} groups)")
        return tuple(found)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return an ``nn.GroupNorm`` with the statistics folded."""
        return Built(build_group_norm(site, old, self._groups(old.channels), str(self)))


def affine_note(site: NormSite) -> tuple[str, ...]:
    """Say that a layer without an affine gets one to hold the folded statistics."""
    if site.bias or site.trained is False:
        return ()
    if site.affine:
        return (f"gains a bias ({site.channels}) to hold the folded statistics",)
    return (f"gains a weight and a bias ({site.channels} each) to hold the folded statistics",)
