"""Weight normalization, alone or with mean-only batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from normsearch.forward import evaluating, try_call
from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.running import RunningNorm, check_input
from normsearch.methods.upstream import (
    ChannelAffine,
    affine_at_site,
    foldable,
    folded_bias,
    scale_and_shift,
    upstream_notes,
    upstream_refusal,
)
from normsearch.moments import batch_mean, is_differentiated_otherwise, subtract_batch_mean
from normsearch.reparametrization import Reparametrized, per_output, rows, smallest
from normsearch.sites import NormSite


def _untrained(site: NormSite) -> bool:
    return site.trained is False and site.kind != "weight"


def _norms(matrix: Tensor) -> Tensor:
    """Return the length of each row, never zero."""
    # vector_norm has no gradient at zero; the square root of a clamped sum has.
    return matrix.square().sum(1).clamp_min(smallest(matrix) ** 2).sqrt()


def _lengths(v: Tensor) -> Tensor:
    """Return the length of each slice of the first dimension, never zero, without a gradient."""
    lengths: Tensor = torch.linalg.vector_norm(v.flatten(1), dim=1).clamp_min_(smallest(v))
    return lengths


class _ScaledDirections(torch.autograd.Function):
    """g v / ‖v‖ for each slice v of the first dimension, keeping v and g alone.

    With s = Σ dw·v: dg = s / ‖v‖ and dv = (g / ‖v‖) (dw − v s / ‖v‖²): two passes over the weight where
    autograd's way takes five, which is what a layer with few outputs spends its time on.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(v, g)
        norm = _lengths(v)
        weight: Tensor = v * (g / norm).reshape(-1, *(1 for _ in v.shape[1:]))
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, g = ctx.saved_tensors
        flat_grad, flat = grad.flatten(1), v.flatten(1)
        if torch.is_grad_enabled():
            norm, along = _norms(flat), (flat_grad * flat).sum(1)
        else:
            norm = torch.linalg.vector_norm(flat, dim=1).clamp_min_(smallest(v))
            # A product of matrices: the sums without the products in memory.
            along = torch.bmm(flat_grad.unsqueeze(1), flat.unsqueeze(2)).reshape(-1)
        scale, of_g = (g / norm).unsqueeze(1), along / norm
        dv = torch.addcmul(flat_grad * scale, flat, scale * (of_g / norm).unsqueeze(1), value=-1)
        return dv.view_as(v), of_g


class WeightNorm(Reparametrized):
    """A convolution or linear layer with weight g_c v_c / ‖v_c‖ per output channel c.

    The gain g of shape (C,) is signed; a zero filter stays zero.

    Source: Salimans and Kingma, 2016, arXiv:1602.07868.
    """

    prefix = "WeightNorm"

    weight_g: Tensor
    weight_v: Tensor

    @property
    def weight(self) -> Tensor:
        """G v / ‖v‖."""
        v = self.weight_v
        if not (isinstance(self, _ConvTransposeNd) or is_differentiated_otherwise(v)):
            weight: Tensor = _ScaledDirections.apply(v, self.weight_g)
            return weight
        return v * per_output(self.weight_g / _norms(rows(v, self)), self, v)

    @classmethod
    def normalized(cls, layer: nn.Module, scale: Tensor | None = None) -> WeightNorm:
        """Return ``layer`` with v its weight and g = scale·‖v‖: its outputs, scaled per channel."""
        new = cls.of(layer)
        v = layer.get_parameter("weight")
        if isinstance(layer, _ConvTransposeNd):
            norm = rows(v.detach().double(), layer).square().sum(1).sqrt()
        else:
            # The very number that the forward pass divides by: without a scale, the weight stays bit for bit.
            norm = _lengths(v.detach())
        gain = norm if scale is None else norm * scale
        new.register_parameter("weight_g", nn.Parameter(gain.to(v.dtype), requires_grad=v.requires_grad))
        new.register_parameter("weight_v", v)
        return new


class MeanOnlyBatchNorm(RunningNorm):
    """Subtract the batch's mean per channel and add a bias; the partner of weight normalization.

    y = γ (x − μ_B) + β in training, with the running mean in eval. There is γ only where the layer before
    could not take it over.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        momentum: step of the running mean; None means a cumulative average.
        scale: whether there is γ.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Source: Salimans and Kingma, 2016, arXiv:1602.07868, section 4.

    Example:
        >>> MeanOnlyBatchNorm(8)(torch.randn(4, 8, 5, 5)).mean((0, 2, 3)).abs().max() < 1e-6
        tensor(True)

    """

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        scale: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, 0.0, momentum, True, True, device, dtype)
        self.running_var = None
        if not scale:
            self.weight = None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Centre (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        assert self.running_mean is not None
        if self.training and not self.synchronized and self.weight is None:
            y, mean = subtract_batch_mean(x, self.bias)
            self.update(mean)
            return y
        mean = self.running_mean
        if self.training:
            mean = batch_mean(x, synchronized=self.synchronized, process_group=self.process_group)
            self.update(mean)
        shape = (-1, *(1 for _ in x.shape[2:]))
        if self.weight is not None:
            y = (x - mean.reshape(shape)) * self.weight.reshape(shape)
            return (y if self.bias is None else y + self.bias.reshape(shape)).to(x.dtype)
        # One addition of x's size: the shift is made first.
        shift = -mean if self.bias is None else self.bias - mean
        return x + shift.reshape(shape).to(x.dtype)

    def extra_repr(self) -> str:
        """Print what this layer has."""
        return f"{self.num_features}, momentum={self.momentum}, scale={self.weight is not None}"


@dataclass(frozen=True)
class Weight(Method):
    """Normalize the weights of the layer that feeds the site instead of its activations.

    The layer's own weight becomes v, its length per output channel times BatchNorm's scale the gain g: the
    trained function is kept exactly. Where the layer cannot take the scale over, it is normalized all the
    same and a scale and a shift per channel stay at the site. In an untrained network, with ``inputs``
    given to ``convert``, v is drawn from N(0, 0.05²) and g and the bias are set from one batch so that each
    output starts with mean 0 and variance 1.

    Args:
        mean_only: subtract the batch's mean too (mean-only batch normalization).

    """

    name = "weight"
    title = "Weight Normalization"
    citation = "Salimans and Kingma, 2016, arXiv:1602.07868"
    needs_producer = True
    of_weights = True

    mean_only: bool = False

    @property
    def exact(self) -> bool:
        """The same weights, written differently."""
        return True

    def exact_at(self, site: NormSite) -> bool:
        """Unless the layer was never trained: then it may be drawn anew."""
        return super().exact_at(site) and not _untrained(site)

    def leaves(self, site: NormSite) -> tuple[str, ...]:
        """Return what of BatchNorm's numbers is still at the site: none where it is ``nn.Identity``."""
        if not foldable(site):
            return ("weight", "bias", *(("running_mean",) if self.mean_only else ()))
        return ("bias", "running_mean") if self.mean_only else ()

    @property
    def batch_independent(self) -> bool:
        """Unless the batch's mean is subtracted."""
        return not self.mean_only

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse without statistics or without any weight upstream."""
        return upstream_refusal(self, site)

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine stays, and what happens to an untrained layer."""
        drawn = ("untrained: v and g are drawn anew if convert is given inputs=",) if _untrained(site) else ()
        return (*upstream_notes(site), *drawn)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return what stays at the site and the producer with its weight normalized."""
        if site.kind == "weight":
            assert producer is not None
            return Built(WeightNorm.normalized(producer))
        if producer is None or not foldable(site):
            after = self._mean_only(old, None) if self.mean_only else affine_at_site(old)
            return Built(after, None if producer is None else WeightNorm.normalized(producer))
        scale, shift = scale_and_shift(old)
        normalized = WeightNorm.normalized(producer, scale)
        if old.weight is not None:
            normalized.weight_g.requires_grad_(old.weight.requires_grad)
        if not self.mean_only:
            normalized.register_parameter("bias", folded_bias(producer, old, scale, shift))
            return Built(nn.Identity(), normalized)
        if normalized.bias is not None:
            normalized.register_parameter("bias", folded_bias(producer, old, scale, 0.0))
        return Built(self._mean_only(old, scale), normalized)

    def _mean_only(self, old: TrainedNorm, folded_scale: Tensor | None) -> MeanOnlyBatchNorm:
        """Centre by the running mean in the units that the input has after folding."""
        scale, _ = scale_and_shift(old)
        layer = MeanOnlyBatchNorm(old.channels, old.momentum, scale=folded_scale is None, **old.factory)
        mean = old.statistics()[0] if folded_scale is None else folded_scale * old.statistics()[0]
        layer.get_buffer("running_mean").copy_(mean)
        if old.num_batches_tracked is not None:
            layer.get_buffer("num_batches_tracked").copy_(old.num_batches_tracked)
        if folded_scale is None:
            layer.get_parameter("weight").copy_(scale).requires_grad_(old.trainable)
        if old.bias is not None:
            layer.get_parameter("bias").copy_(old.bias).requires_grad_(old.bias.requires_grad)
        layer.synchronized, layer.process_group = old.synchronized, old.process_group
        return layer

    @torch.no_grad()
    def initialise(
        self, model: nn.Module, untrained: Sequence[tuple[TrainedNorm, Built]], inputs: Any
    ) -> None:
        """Draw v from N(0, 0.05²) and set gain and bias so that outputs start with mean 0 and variance 1.

        γ and β multiply and shift on top of that: a residual branch that starts at zero still does.
        """
        handles = []
        for old, (at_site, producer) in untrained:
            if isinstance(at_site, ChannelAffine) or _has_scale(at_site):
                handles.append(at_site.register_forward_pre_hook(_StandardizeAffine(old)))
            elif isinstance(producer, WeightNorm):
                nn.init.normal_(producer.weight_v, std=0.05)
                handles.append(producer.register_forward_pre_hook(_StandardizeOutput(old, at_site)))
        try:
            with evaluating(model):
                try_call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()


def _has_scale(layer: nn.Module) -> bool:
    return isinstance(layer, MeanOnlyBatchNorm) and layer.weight is not None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of (N, C, *spatial)."""
    axes = (0, *range(2, x.dim()))
    return x.mean(axes), x.var(axes, unbiased=False).sqrt().clamp_min(smallest(x))


class _Standardize:
    """A forward pre-hook that sets a layer from what reaches it first."""

    def __init__(self, old: TrainedNorm) -> None:
        self._gamma: Tensor | float = 1.0 if old.weight is None else old.weight.detach()
        self._beta: Tensor | float = 0.0 if old.bias is None else old.bias.detach()
        self._done = False

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if not self._done:
            self._done = True
            self.set(layer, *inputs)

    def set(self, layer: Any, x: Tensor) -> None:
        """Set the layer."""
        raise NotImplementedError


class _StandardizeAffine(_Standardize):
    """Make the affine that stays at a site standardize its input."""

    def set(self, layer: Any, x: Tensor) -> None:
        mean, deviation = _statistics(x)
        scale = self._gamma / deviation
        layer.weight.copy_(scale)
        if isinstance(layer, MeanOnlyBatchNorm):
            layer.get_buffer("running_mean").copy_(mean)
        else:
            layer.bias.copy_(self._beta - scale * mean)


class _StandardizeOutput(_Standardize):
    """Make a weight-normalized layer's output have mean β and deviation |γ|."""

    def __init__(self, old: TrainedNorm, at_site: nn.Module) -> None:
        super().__init__(old)
        self._at_site = at_site

    def set(self, layer: Any, x: Tensor) -> None:
        bias, layer.bias = layer.bias, None
        layer.weight_g.fill_(1)
        mean, deviation = _statistics(layer.forward(x))
        layer.bias = bias
        scale = self._gamma / deviation
        layer.weight_g.copy_(scale)
        if not isinstance(self._at_site, MeanOnlyBatchNorm):
            bias.copy_(self._beta - scale * mean)
            return
        # The site centres: the layer's own bias would come and go.
        self._at_site.get_buffer("running_mean").copy_(scale * mean)
        if bias is not None:
            bias.zero_()
