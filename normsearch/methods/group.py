"""Group normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError
from normsearch.methods.base import Built, ElementGuard, Method, Refusal, TrainedNorm
from normsearch.methods.upstream import foldable, producer_refusal
from normsearch.methods.weight_standardization import StandardizedWeight
from normsearch.methods.whitening import whitened, whitening_note
from normsearch.sites import NormSite


def number_of_groups(channels: int, asked: int | None) -> int:
    """Return the largest divisor of C up to ``asked``; by default up to 32 with at least 16 channels each."""
    most, least_size = (32, 16) if asked is None else (asked, 1)
    fitting = [
        g for g in range(1, min(most, channels) + 1) if channels % g == 0 and channels // g >= least_size
    ]
    return max(fitting, default=1)


def groups_note(channels: int, asked: int | None) -> tuple[str, ...]:
    """Say that there will be fewer groups than asked for."""
    groups = number_of_groups(channels, asked)
    if asked is None or groups == asked:
        return ()
    return (f"{asked} groups do not divide {channels} channels: {groups}, the next number that does",)


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
        weight_standardization: standardize the filters of the layer that feeds the site too, the recipe of
            BiT; gain and offset per filter keep its function.
        whiten: bring the input to mean 0 and variance 1 by the running statistics first, inside the layer
            that feeds the site, where it is read there alone; elsewhere statistics are folded as ever.

    """

    name = "group"
    title = "Group Normalization"
    citation = "Wu and He, 2018, arXiv:1803.08494"
    batch_independent = True

    groups: int | None = None
    weight_standardization: bool = False
    whiten: bool = False

    @property
    def needs_producer(self) -> bool:
        """Whether a weight is standardized or whitens."""
        return self.weight_standardization or self.whiten

    def rewrites_producer(self, site: NormSite) -> bool:
        """Whether the weight before this site changes."""
        return self.weight_standardization or (self.whiten and foldable(site))

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
        return number_of_groups(channels, self.groups)

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse where a group is a single element, so that the output would be β, or without a weight."""
        refusal = producer_refusal(self, site, "group") if self.weight_standardization else None
        if refusal is not None:
            return refusal
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
        found = [*affine_note(site), *groups_note(site.channels, self.groups)]
        if self.whiten:
            found.append(whitening_note(site))
        if self.weight_standardization and site.producer is not None:
            found.append(f"standardizes the weight of {site.producer.path}")
        if self.groups is not None and groups == site.channels:
            found.append(f"one channel per group: this is instance normalization ({groups} groups)")
        return tuple(found)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return an ``nn.GroupNorm`` with the statistics folded, and the producer standardized if asked."""
        old, white = whitened(site, old, producer) if self.whiten else (old, None)
        layer = build_group_norm(site, old, self._groups(old.channels), str(self))
        if producer is None or not self.weight_standardization:
            return Built(layer, white)
        return Built(layer, StandardizedWeight.standardized(white or producer))


def affine_note(site: NormSite) -> tuple[str, ...]:
    """Say that a layer without an affine gets one to hold the folded statistics."""
    if site.bias or site.trained is False:
        return ()
    if site.affine:
        return (f"gains a bias ({site.channels}) to hold the folded statistics",)
    return (f"gains a weight and a bias ({site.channels} each) to hold the folded statistics",)
