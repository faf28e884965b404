"""Normalization layers as public implementations write them: the formula over the whole input, by autograd.

Each takes the place of one of normsearch's layers in `benchmarks.layers`, in training mode, with the same
parameters, running statistics and initial values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Formula(nn.Module):
    """γ, β and running statistics for a two-dimensional layer; subclasses write the formula."""

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's mean and biased variance, and follow them with the running ones."""
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        with torch.no_grad():
            self.get_buffer("running_mean").lerp_(mean, self.momentum)
            self.get_buffer("running_var").lerp_(variance, self.momentum)
        return mean, variance

    def affine(self, normalized: Tensor) -> Tensor:
        """Return γ·normalized + β."""
        return normalized * self.weight + self.bias


class Switchable(Formula):
    """Means and variances of instance, layer and batch, mixed by two softmaxes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.mean_logits = nn.Parameter(torch.zeros(3))
        self.var_logits = nn.Parameter(torch.zeros(3))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the two mixtures."""
        return self.mean_logits.softmax(0), self.var_logits.softmax(0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        own = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)
        layer = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True)
        mean, variance = (
            w[0] * a + w[1] * b + w[2] * c
            for w, a, b, c in zip(self.weights(), own, layer, self.batch(x), strict=True)
        )
        return self.affine((x - mean) / (variance + self.eps).sqrt())


class SparseSwitchable(Switchable):
    """The same with sparsemax, which sparsestmax is at the start."""

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the two mixtures."""
        return self.sparsemax(self.mean_logits), self.sparsemax(self.var_logits)

    def sparsemax(self, logits: Tensor) -> Tensor:
        """Return the closest point of the simplex."""
        ordered = logits.sort(descending=True).values
        total = ordered.cumsum(0) - 1
        ranks = torch.arange(1, 4, device=logits.device)
        support = (ranks * ordered > total).sum()
        return (logits - total[support - 1] / support).clamp_min(0)


class BatchInstance(Formula):
    """ρ of batch norm's and 1 − ρ of instance norm's output."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.rho = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        mean, variance = self.batch(x)
        of_batch = (x - mean) / (variance + self.eps).sqrt()
        own_mean, own_var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        of_instance = (x - own_mean) / (own_var + self.eps).sqrt()
        rho = self.rho.clamp(0, 1)
        return self.affine(rho * of_batch + (1 - rho) * of_instance)


class BatchRenorm(Formula):
    """Batch norm corrected by r and d towards the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        old_mean = self.get_buffer("running_mean").clone()
        old_sigma = (self.get_buffer("running_var") + self.eps).sqrt()
        mean, variance = self.batch(x)
        sigma = (variance + self.eps).sqrt()
        r = (sigma.detach() / old_sigma).clamp(1 / 3, 3)
        d = ((mean.detach() - old_mean) / old_sigma).clamp(-5, 5)
        return self.affine((x - mean) / sigma * r + d)


class InstanceBatch(Formula):
    """Instance norm on the first half of the channels, batch norm on the second."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.own = channels // 2
        self.instance = nn.InstanceNorm2d(self.own, affine=True)
        self.batch_half = nn.BatchNorm2d(channels - self.own)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        first, second = x.split([self.own, x.shape[1] - self.own], 1)
        return torch.cat([self.instance(first.contiguous()), self.batch_half(second.contiguous())], 1)


class Ghost(Formula):
    """Batch norm on chunks of the batch."""

    def __init__(self, channels: int, size: int = 32) -> None:
        super().__init__(channels)
        self.size = size
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        return torch.cat([self.norm(chunk) for chunk in x.split(self.size)])


class FilterResponse(Formula):
    """Division by the root mean square over space, and a learned threshold."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1e-6)
        self.tau = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        x = x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + self.eps)
        return torch.maximum(self.affine(x), self.tau)
