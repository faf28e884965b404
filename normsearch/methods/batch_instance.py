"""Batch-instance normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import ShapeError
from normsearch.methods.base import Built, Method, TrainedNorm
from normsearch.methods.running import RunningNorm, Statistics, check_input
from normsearch.moments import ClosedRule, is_written_down, normalize
from normsearch.sites import NormSite


class _ClampInward(torch.autograd.Function):
    """Clamp to [0, 1]; at and beyond a bound the gradient passes only if descent leads back inside.

    A plain clamp stops every gradient there, so a gate that starts at its bound, or was pushed past it by
    momentum, could never return.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor) -> Tensor:
        return gate.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate,) = ctx.saved_tensors
        return _inward(gate, grad)


def _clamped(gate: Tensor) -> Tensor:
    if is_written_down():
        # No operator's gradient depends on its direction: here it passes always.
        return gate + (gate.clamp(0, 1) - gate).detach()
    clamped: Tensor = _ClampInward.apply(gate)
    return clamped


def _inward(gate: Tensor, grad: Tensor) -> Tensor:
    outward = ((gate >= 1) & (grad < 0)) | ((gate <= 0) & (grad > 0))
    return grad.masked_fill(outward, 0)


class BatchInstanceNorm(RunningNorm):
    """A learned mixture of batch and instance normalization per channel.

    y = γ (ρ x̂_BN + (1 − ρ) x̂_IN) + β with ρ ∈ [0, 1] per channel, 1 at the start. x̂_BN uses the batch in
    training and the running statistics in eval. Where a map has one element, or the input is (N, C),
    x̂_IN is 0. ρ learns best at ten times the learning rate and without weight decay.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to both variances.
        momentum: step of the running statistics; None means a cumulative average.
        affine: whether there are γ and β of shape (C,).
        track_running_stats: whether eval mode uses running statistics; else the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        ShapeError: in training, a batch with one value per channel.

    Source: Nam and Kim, 2018, arXiv:1805.07925.

    Example:
        >>> layer = BatchInstanceNorm(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, layer.rho.detach().unique()
        (torch.Size([4, 8, 5, 5]), tensor([1.]))

    """

    gates = ("rho",)

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
        self.rho = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the statistics, γ and β, and set ρ to one."""
        super().reset_parameters()
        nn.init.ones_(self.rho)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        elements = x.shape[2:].numel()
        if self.training and x.shape[0] * elements == 1 and not self.synchronized:
            raise ShapeError(
                f"BatchInstanceNorm needs more than one value per channel in training, got {tuple(x.shape)}; "
                "use a larger batch, or group or layer for this site"
            )
        y, statistics = normalize(x, _Gate(self))
        if statistics is not None:
            mean, variance, count = statistics
            self.update(mean, variance, count * elements)
        return y


class _Gate(ClosedRule):
    """Scale = γ (ρ/σ_B + (1 − ρ)/σ), shift = (m − μ_B)·γρ/σ_B + β; hands back the batch's statistics."""

    def __init__(self, layer: BatchInstanceNorm) -> None:
        self.layer = layer
        self.parameters = (layer.rho, layer.weight, layer.bias)
        self.closed = layer.uses_own_batch

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Statistics | None]:
        """Return scale, shift and the batch's statistics."""
        layer = self.layer
        statistics = layer.batch_statistics(mean, variance) if layer.uses_batch else None
        batch_mean, batch_var = layer.running() if statistics is None else statistics[:2]
        self.rho = _clamped(layer.rho)
        self.off = mean - batch_mean.to(mean.dtype)
        self.inverses = (batch_var.to(mean.dtype) + layer.eps).rsqrt(), (variance + layer.eps).rsqrt()
        self.scales = (
            layer.scaled(self.rho * self.inverses[0]),
            layer.scaled((1 - self.rho) * self.inverses[1]),
        )
        of_batch, of_instance = self.scales
        return of_batch + of_instance, layer.shifted(self.off * of_batch), statistics

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the moments, ρ, γ and β."""
        samples = of_shift.shape[0]
        (of_batch, of_instance), (by_batch, by_instance) = self.scales, self.inverses
        through = torch.addcmul(of_scale, of_shift, self.off).sum(0)
        shift = of_shift.sum(0)
        batch, instance = through * by_batch, (of_scale * by_instance).sum(0)
        batch_var = through * of_batch * by_batch.square() * (-0.5 / samples)
        of_mean = torch.addcmul(shift * of_batch / -samples, self.off, batch_var, value=2)
        of_mean.addcmul_(of_shift, of_instance, value=-1)
        of_variance = torch.addcmul(batch_var, of_scale * of_instance, by_instance.square(), value=-0.5)
        of_rho = _inward(self.layer.rho, self.layer.scaled(batch - instance)).to(self.layer.rho.dtype)
        weighted = torch.lerp(instance, batch, self.rho.to(batch.dtype))
        return of_mean, of_variance, (of_rho, *self.layer.of_affine(weighted, shift))


@dataclass(frozen=True)
class BatchInstance(Method):
    """Learn per channel how much batch and how much instance normalization; starts as BatchNorm."""

    name = "batch_instance"
    title = "Batch-Instance Normalization"
    citation = "Nam and Kim, 2018, arXiv:1805.07925"
    batch_independent = False
    carries_parameters = True
    carries_statistics = True

    @property
    def exact(self) -> bool:
        """At ρ = 1 it is BatchNorm."""
        return True

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``BatchInstanceNorm`` at ρ = 1."""
        layer = BatchInstanceNorm(
            old.channels, old.eps, old.momentum, old.has_affine, site.track_running_stats, **old.factory
        )
        layer.take_over(old)
        layer.rho.requires_grad_(old.trainable)
        return Built(layer)
