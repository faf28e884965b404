"""The rule of layers that mix the statistics of instance, layer and batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from normsearch.methods.running import RunningNorm, Statistics
from normsearch.moments import ClosedRule, group_moments


class Mixture(ClosedRule):
    """Scale = γ / √(Σ w'_k σ²_k + eps), shift = (m − Σ w_k μ_k)·scale + β over instance, layer and batch.

    It hands back the batch's statistics where it used them, else None.

    Args:
        layer: gives γ, β, eps, the running statistics and whether the batch's are used.
        weights: w and w' over instance, layer and batch, shape (2, 3).

    """

    def __init__(self, layer: RunningNorm, weights: Tensor) -> None:
        self.layer, self.weights = layer, weights
        self.parameters = (weights, layer.weight, layer.bias)
        self.closed = layer.uses_own_batch

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Statistics | None]:
        """Return scale, shift and the batch's statistics."""
        layer = self.layer
        statistics = layer.batch_statistics(mean, variance) if layer.uses_batch else None
        batch_mean, batch_var = layer.running() if statistics is None else statistics[:2]
        layer_mean, layer_var = group_moments(mean, variance, 1)
        self.shares = self.weights.to(mean.dtype).flatten().unbind()
        own_m, layer_m, batch_m, own_v, layer_v, batch_v = self.shares
        mixed_mean = torch.addcmul(torch.addcmul(batch_m * batch_mean, layer_m, layer_mean), own_m, mean)
        mixed_var = torch.addcmul(torch.addcmul(batch_v * batch_var, layer_v, layer_var), own_v, variance)
        self.inverse = (mixed_var + layer.eps).rsqrt()
        self.off = mean - mixed_mean
        self.scale = layer.scaled(self.inverse)
        self.parts = (mean, layer_mean, batch_mean, variance, layer_var, batch_var)
        return self.scale, layer.shifted(self.off * self.scale), statistics

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the moments, the weights, γ and β."""
        samples, channels = of_shift.shape
        mean, layer_mean, batch_mean = self.parts[:3]
        own_m, layer_m, batch_m, own_v, layer_v, batch_v = self.shares
        through = torch.addcmul(of_scale, of_shift, self.off).mul_(self.inverse)
        # Gradients of −Σ w μ, and −2 times that of Σ w' σ².
        centre, spread = of_shift * self.scale, (through * self.scale).mul_(self.inverse)
        sums = (
            (centre, centre.sum(1, keepdim=True), centre.sum(0)),
            (spread, spread.sum(1, keepdim=True), spread.sum(0)),
        )
        of_weights = None
        if self.weights.requires_grad:
            parts = (mean, layer_mean[:, 0], batch_mean, self.parts[3], self.parts[4][:, 0], self.parts[5])
            products = [
                torch.dot(one.flatten(), two.flatten())
                for one, two in zip((*sums[0], *sums[1]), parts, strict=True)
            ]
            of_weights = torch.stack(products).view(2, 3)
            of_weights[0].neg_()
            of_weights[1].mul_(-0.5)
            of_weights = of_weights.to(self.weights.dtype)
        layer_s, batch_s = sums[1][1] * (layer_v / channels), sums[1][2] * (batch_v / samples)
        of_mean = own_m * centre + sums[0][1] * (layer_m / channels) + sums[0][2] * (batch_m / samples)
        of_mean.addcmul_(mean - layer_mean, layer_s).addcmul_(mean - batch_mean, batch_s).neg_()
        of_variance = (own_v * spread).add_(layer_s).add_(batch_s).mul_(-0.5)
        return of_mean, of_variance, (of_weights, *self.layer.of_affine(through, of_shift))
