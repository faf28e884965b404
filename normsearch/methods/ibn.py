"""Instance-batch normalization: half of the channels each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import ShapeError
from normsearch.methods.base import Built, ElementGuard, Method, Refusal, TrainedNorm
from normsearch.methods.running import RunningNorm, Statistics, check_input
from normsearch.moments import ClosedRule, normalize, union_gradient
from normsearch.sites import NormSite


class InstanceBatchNorm(RunningNorm):
    """Instance normalization of the first ⌊C/2⌋ channels and batch normalization of the others (IBN-a).

    y = γ (x − μ)/√(σ² + eps) + β with the statistics of each sample over space in the first half and those
    of the batch (in eval the running ones) in the second. Running statistics are kept for all channels.

    Args:
        num_features: C of an input (N, C, *spatial).
        eps: added to the variance.
        momentum: step of the running statistics; None means a cumulative average.
        affine: whether there are γ and β of shape (C,).
        track_running_stats: whether eval mode uses running statistics; else the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ShapeError: an input with one element per sample and channel.

    Source: Pan et al., 2018, arXiv:1807.09441.

    Example:
        >>> y = InstanceBatchNorm(5)(torch.randn(4, 5, 6, 6))
        >>> (y.mean((2, 3)).abs().amax(0) < 1e-6).tolist()
        [True, True, False, False, False]

    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        elements = x.shape[2:].numel()
        if elements == 1:
            raise ShapeError(
                "InstanceBatchNorm needs more than one element per sample and channel, got "
                f"{tuple(x.shape)}: half of its channels would be constant; use group, layer or "
                "batch_instance for this site"
            )
        y, statistics = normalize(x, _Halves(self))
        if statistics is not None:
            mean, variance, count = statistics
            self.update(mean, variance, count * elements)
        return y


class _Halves(ClosedRule):
    """Scale = γ/√(σ² + eps) with each sample's σ² in the first half and the batch's in the second.

    Shift = β in the first half, (m − μ_B)·scale + β in the second. It hands back the batch's statistics where
    it used them, else None.
    """

    def __init__(self, layer: InstanceBatchNorm) -> None:
        self.layer, self.half = layer, layer.num_features // 2
        self.parameters = (layer.weight, layer.bias)
        self.closed = layer.uses_own_batch

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Statistics | None]:
        """Return scale, shift and the batch's statistics."""
        layer, half = self.layer, self.half
        statistics = layer.batch_statistics(mean, variance) if layer.uses_batch else None
        centre, spread = layer.running() if statistics is None else statistics[:2]
        of_batch = spread[half:].to(variance.dtype).expand(mean.shape[0], -1)
        self.inverse = (torch.cat([variance[:, :half], of_batch], 1) + layer.eps).rsqrt()
        self.scale = layer.scaled(self.inverse)
        self.off = mean[:, half:] - centre[half:].to(mean.dtype)
        shift = torch.cat([torch.zeros_like(mean[:, :half]), self.off * self.scale[:, half:]], 1)
        return self.scale, layer.shifted(shift), statistics

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the moments, γ and β."""
        half, scale, inverse = self.half, self.scale[:, : self.half], self.inverse[:, : self.half]
        by_inverse = of_scale[:, :half] * inverse
        of_own = (by_inverse * scale).mul_(inverse).mul_(-0.5)
        of_mean, of_batch, through, _ = union_gradient(
            of_scale[:, half:], of_shift[:, half:], self.off, self.scale[:1, half:], self.inverse[:1, half:]
        )
        of_mean = torch.cat([(of_shift[:, :half] * scale).neg_(), of_mean], 1)
        of_variance = torch.cat([of_own, of_batch.expand(of_own.shape[0], -1)], 1)
        scaled = torch.cat([by_inverse.sum(0), (through * self.inverse[:1, half:])[0]])
        return of_mean, of_variance, self.layer.of_affine(scaled, of_shift)


@dataclass(frozen=True)
class InstanceBatch(Method):
    """Normalize half of the channels per instance, the others by the batch (IBN-a).

    The paper puts it after the first convolution of each residual block, in all stages but the last.
    """

    name = "ibn"
    title = "Instance-Batch Normalization"
    citation = "Pan et al., 2018, arXiv:1807.09441"
    batch_independent = False
    carries_parameters = True
    carries_statistics = True

    @property
    def exact(self) -> bool:
        """The batch half is; the instance half uses statistics of a sample."""
        return False

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse where there is no half, or half of the output would be constant."""
        if site.channels == 1:
            return self.refuse(site, "a single channel has no half", "choose instance or batch_instance")
        if site.fewest_elements == 1:
            return self.refuse(
                site,
                "the instance half would be constant on a map of one element",
                "choose group, layer or batch_instance",
            )
        return None

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say how channels are split, and where the shape is not known."""
        if site.channels is None:
            return ()
        half = site.channels // 2
        found = [f"{half} channels per instance, {site.channels - half} by the batch"]
        if site.fewest_elements is None:
            found.append("the input's shape is unknown: checked at run time")
        return tuple(found)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return an ``InstanceBatchNorm``; a sample's statistics stand for the running ones, so γ, β stay."""
        layer = InstanceBatchNorm(
            old.channels, old.eps, old.momentum, old.has_affine, site.track_running_stats, **old.factory
        )
        layer.take_over(old)
        if site.fewest_elements is None:
            consequence = "which leaves half of the channels constant"
            layer.register_forward_pre_hook(ElementGuard(site.path, str(self), 1, consequence))
        return Built(layer)
