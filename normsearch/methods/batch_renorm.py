"""Batch renormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import MethodError
from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.running import RunningNorm, Statistics, check_input, held
from normsearch.moments import ClosedRule, normalize, union_gradient
from normsearch.sites import NormSite

#: The paper's schedule in steps: both bounds are off until WARM_UP, then grow linearly to their ends.
WARM_UP, R_END, D_END = 5_000, 40_000, 25_000


class BatchRenorm(RunningNorm):
    """Batch normalization whose training output is corrected towards the running statistics.

    In training y = γ (x̂ r + d) + β with x̂ = (x − μ_B)/σ_B, r = clip(σ_B/σ, 1/r_max, r_max) and
    d = clip((μ_B − μ)/σ, −d_max, d_max), both without gradient, σ = √(running_var + eps), and the buffers
    as they were before this step. In eval y = γ (x − μ)/σ + β. The bounds start at (1, 0), plain batch
    normalization, for 5,000 steps, then grow linearly: r_max at 40,000, d_max at 25,000.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the variance.
        momentum: step of the running statistics; None means a cumulative average.
        affine: whether there are γ and β of shape (C,).
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        r_max: final bound of r, at least 1.
        d_max: final bound of d, at least 0.

    Source: Ioffe, 2017, arXiv:1702.03275.

    Example:
        >>> layer = BatchRenorm(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, int(layer.renorm_step)
        (torch.Size([4, 8, 5, 5]), 1)

    """

    renorm_step: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.r_max, self.d_max = r_max, d_max
        self.register_buffer("renorm_step", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the statistics, γ, β and the schedule."""
        super().reset_parameters()
        self.renorm_step.zero_()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the bounds of r and d at the current step."""
        step = self.renorm_step.double()
        r = 1 + (self.r_max - 1) * ((step - WARM_UP) / (R_END - WARM_UP)).clamp(0, 1)
        d = self.d_max * ((step - WARM_UP) / (D_END - WARM_UP)).clamp(0, 1)
        return r, d

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        if not self.training:
            mean, variance = self.running()
            return nn.functional.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        y, (mean, variance, count) = normalize(x, _Corrected(self))
        self.update(mean, variance, count * x.shape[2:].numel())
        self.renorm_step.add_(1)
        return y

    def corrections(self, mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d for a batch's mean and √(variance + eps), by the buffers as they are."""
        old_mean, old_var = (held(part.to(mean.dtype)) for part in self.running())
        r_max, d_max = (held(bound.to(mean.dtype)) for bound in self.bounds())
        old_sigma = (old_var + self.eps).sqrt()
        r = torch.clamp(sigma / old_sigma, 1 / r_max, r_max)
        return r, torch.clamp((mean - old_mean) / old_sigma, -d_max, d_max)

    def extra_repr(self) -> str:
        """Print what torch's layers print, and the bounds."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class _Corrected(ClosedRule):
    """Scale = γ r/σ_B, shift = (m − μ_B)·scale + γ d + β; hands back the batch's statistics."""

    def __init__(self, layer: BatchRenorm) -> None:
        self.layer = layer
        self.parameters = (layer.weight, layer.bias)
        self.closed = layer.uses_own_batch
        #: r and d are constants of this pass, made from the buffers as they are before it.
        self.corrections: tuple[Tensor, Tensor] | None = None

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Statistics]:
        """Return scale, shift and the batch's statistics."""
        layer = self.layer
        statistics = layer.batch_statistics(mean, variance)
        batch_mean, batch_var, _ = statistics
        sigma = (batch_var + layer.eps).sqrt()
        if self.corrections is None:
            self.corrections = layer.corrections(batch_mean.detach(), sigma.detach())
        r, d = self.corrections
        self.off, self.sigma = mean - batch_mean, sigma
        self.scale = layer.scaled(r / sigma)
        return self.scale, layer.shifted(self.off * self.scale + layer.scaled(d)), statistics

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the moments, γ and β."""
        assert self.corrections is not None
        r, d = self.corrections
        inverse = self.sigma.reciprocal()
        of_mean, of_variance, through, shift = union_gradient(
            of_scale, of_shift, self.off, self.scale, inverse
        )
        return of_mean, of_variance, self.layer.of_affine(through * r * inverse + shift * d, shift)


@dataclass(frozen=True)
class BatchRenormalization(Method):
    """Batch normalization that trains and infers with nearly the same function, also at small batches.

    Args:
        r_max: final bound of the scale correction.
        d_max: final bound of the shift correction.

    """

    name = "batch_renorm"
    title = "Batch Renormalization"
    citation = "Ioffe, 2017, arXiv:1702.03275"
    batch_independent = False
    carries_parameters = True
    carries_statistics = True

    r_max: float = 3.0
    d_max: float = 5.0

    def validate(self) -> None:
        """Check the bounds."""
        if not self.r_max >= 1 or not self.d_max >= 0:
            raise MethodError(f"{self}: r_max must be at least 1 and d_max at least 0")

    @property
    def exact(self) -> bool:
        """In eval mode it is BatchNorm."""
        return True

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse a layer without running statistics, which r and d are made from."""
        if site.track_running_stats:
            return None
        return self.refuse(
            site,
            "the layer has no running statistics to renormalize to",
            "choose group, layer or batch_instance",
        )

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``BatchRenorm``; a trained layer's statistics are good, so the warm-up is skipped."""
        layer = BatchRenorm(
            old.channels,
            old.eps,
            old.momentum,
            old.has_affine,
            **old.factory,
            r_max=self.r_max,
            d_max=self.d_max,
        )
        layer.take_over(old)
        if old.trained:
            layer.renorm_step.fill_(R_END)
        return Built(layer)
