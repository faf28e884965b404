"""EvoNorm-S0: normalization and activation in one formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError, ShapeError
from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.filter_response import activation_note
from normsearch.methods.group import affine_note, group_statistics, groups_note, number_of_groups
from normsearch.methods.running import check_input, make_affine, reset_affine
from normsearch.methods.upstream import fold_into, foldable, scale_and_shift
from normsearch.moments import group_moments, normalize
from normsearch.sites import NormSite

#: v for which z σ(v z) is closest to an activation of a standard normal z, by the activation's class: within
#: 0 % of SiLU, 1 % of GELU and 4 % of Hardswish. ReLU is the limit of large v, where v no longer learns:
#: at 8 the difference is 2 % and it does.
_SHARPNESS = {
    "torch.nn.modules.activation.SiLU": 1.0,
    "torch.nn.modules.activation.GELU": 1.702,
    "torch.nn.modules.activation.Hardswish": 0.785,
    "torch.nn.modules.activation.ReLU": 8.0,
}


class EvoNormS0(nn.Module):
    """A gated input over the standard deviation of its group: y = γ x σ(v x) / √(σ_g² + eps) + β.

    σ_g² is the variance over (C/groups, *spatial) of each sample, σ the logistic function, v per channel.
    At v = 0 the gate is ½ and the layer is linear in x apart from σ_g; the mean is kept.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        groups: number of groups; divides C.
        eps: added to the variance.
        affine: whether there are γ and β of shape (C,).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ShapeError: an input with one element per group.

    Source: Liu et al., 2020, arXiv:2004.02967.

    Example:
        >>> layer = EvoNormS0(48, groups=3)
        >>> layer(torch.randn(2, 48, 4, 4)).shape, layer.v.detach().unique()
        (torch.Size([2, 48, 4, 4]), tensor([1.]))

    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_features, self.groups, self.eps, self.affine = num_features, groups, eps, affine
        make_affine(self, num_features, affine, factory)
        self.v = nn.Parameter(torch.empty(num_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ and v to one and β to zero."""
        reset_affine(self)
        nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and gate (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        if self.num_features // self.groups * x.shape[2:].numel() == 1:
            raise ShapeError(
                f"EvoNormS0 needs more than one element per group, got {tuple(x.shape)} in {self.groups} "
                "groups; use fewer groups, or frozen for this site"
            )
        shape = (-1, *(1 for _ in x.shape[2:]))
        scaled, _ = normalize(x, self._rule)
        y = scaled * torch.sigmoid(self.v.to(x.dtype).reshape(shape) * x)
        return y if self.bias is None else y + self.bias.to(x.dtype).reshape(shape)

    def _rule(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = (group_moments(mean, variance, self.groups)[1] + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        # x·scale, written around the mean.
        return scale, mean * scale, None

    def extra_repr(self) -> str:
        """Print what this layer has."""
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}, affine={self.affine}"


@dataclass(frozen=True)
class EvoNorm(Method):
    """Divide by the standard deviation of a group and gate by a sigmoid: normalization and activation in one.

    Where a ReLU, SiLU, GELU or Hardswish follows that nothing else reads from, and the layer before can take
    BatchNorm's scale and shift over, the layer takes the activation's place: the input then is what BatchNorm
    put out, and v starts where z σ(v z) is closest to that activation. Elsewhere the activation stays and v
    starts at 0, where the gate is ½: the layer starts linear, as BatchNorm is, and may learn to bend.

    Args:
        groups: as for ``group``.

    """

    name = "evonorm_s0"
    title = "EvoNorm-S0"
    citation = "Liu et al., 2020, arXiv:2004.02967"
    batch_independent = True
    activates = True
    needs_producer = True

    groups: int | None = None

    def validate(self) -> None:
        """Check the number of groups."""
        if self.groups is not None and self.groups < 1:
            raise MethodError(f"evonorm_s0(groups={self.groups}): groups must be at least 1")

    @property
    def exact(self) -> bool:
        """Statistics of a sample replace those of the training set."""
        return False

    def resolve(self, site: NormSite) -> EvoNorm:
        """Fill in the number of groups."""
        if site.channels is None:
            return self
        return replace(self, groups=number_of_groups(site.channels, self.groups))

    def absorbs(self, site: NormSite) -> bool:
        """Whether an activation of this form follows, and the layer before can take the shift over."""
        act = site.followed_by
        known = act is not None and act.removable and act.layer in _SHARPNESS
        return known and foldable(site) and site.track_running_stats

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse where a group is a single element, whose deviation is 0."""
        if site.channels is None or site.fewest_elements is None:
            return None
        if site.channels // number_of_groups(site.channels, self.groups) * site.fewest_elements > 1:
            return None
        return self.refuse(
            site, "a group of one element has no deviation to divide by", "choose fewer groups or frozen"
        )

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added and what becomes of the activation."""
        if site.channels is None:
            return ()
        act = activation_note(self, site, "starts linear")
        return (*affine_note(site), *groups_note(site.channels, self.groups), act)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return an ``EvoNormS0``, and the producer with BatchNorm's scale and shift in it."""
        groups = number_of_groups(old.channels, self.groups)
        layer = EvoNormS0(old.channels, groups, old.eps, affine=old.needs_affine, **old.factory)
        layer.v.requires_grad_(old.trainable)
        if not self.absorbs(site):
            self._start_linear(layer, old)
            return Built(layer)
        assert producer is not None
        assert site.followed_by is not None
        if not old.trained:
            # The paper's own start; the producer's shape does not depend on whether there is much to fold.
            old.carry(layer)
            nothing = torch.zeros(old.channels, dtype=torch.float64, device=layer.v.device)
            return Built(layer, fold_into(producer, old, nothing + 1, nothing))
        layer.v.fill_(_SHARPNESS[site.followed_by.layer])
        scale, shift = scale_and_shift(old)
        # What BatchNorm puts out, z, has mean β and variance s²σ² per channel: σ_g² = mean s²σ² + var β.
        mean, variance = old.statistics()
        parts = (scale * mean + shift).reshape(groups, -1), (scale.square() * variance).reshape(groups, -1)
        spread = parts[1].mean(1) + parts[0].var(1, correction=0)
        deviation = (spread + old.eps).sqrt().repeat_interleave(old.channels // groups)
        for name, value in (("weight", deviation), ("bias", torch.zeros_like(deviation))):
            before = getattr(old, name)
            trainable = old.trainable if before is None else before.requires_grad
            new = nn.Parameter(value.to(**old.factory), requires_grad=trainable)
            layer.register_parameter(name, new)
        return Built(layer, fold_into(producer, old, scale, shift))

    def _start_linear(self, layer: EvoNormS0, old: TrainedNorm) -> None:
        """Fold the expected deviation of each group where the gate is ½: γ' = 2 s σ_g, β' = β − s μ."""
        if not old.trained:
            old.carry(layer)
            return
        layer.v.zero_()
        _, spread = group_statistics(old, layer.groups)
        old.fold(layer, torch.zeros_like(spread), spread)
        assert layer.weight is not None
        layer.weight.mul_(2)
