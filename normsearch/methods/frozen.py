"""BatchNorm with its statistics fixed for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.methods.base import Built, Method, Refusal, TrainedNorm
from normsearch.methods.running import check_input, make_affine
from normsearch.sites import NormSite


class FrozenBatchNorm(nn.Module):
    """A fixed affine: y = γ (x − μ) / √(σ² + eps) + β with μ, σ² as buffers, in train mode too.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        eps: added to the variance.
        affine: whether there are γ and β of shape (C,); they are Parameters and may be trained.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Source: He et al., 2016, arXiv:1512.03385 (detection fine-tuning); torchvision's FrozenBatchNorm2d.

    Example:
        >>> layer, x = FrozenBatchNorm(3, eps=0.0), torch.randn(2, 3, 4, 4)
        >>> torch.equal(layer(x), x)
        True

    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_features, self.eps, self.affine = num_features, eps, affine
        make_affine(self, num_features, affine, factory)
        self.register_buffer("running_mean", torch.empty(num_features, **factory))
        self.register_buffer("running_var", torch.empty(num_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ and σ² to one, β and μ to zero."""
        for tensor, value in (
            (self.weight, 1.0),
            (self.bias, 0.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        ):
            if tensor is not None:
                nn.init.constant_(tensor, value)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the affine to (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        wide = torch.promote_types(self.running_mean.dtype, torch.float32)
        scale = (self.running_var.to(wide) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (-1, *(1 for _ in x.shape[2:]))
        return (x * scale.reshape(shape) + shift.reshape(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        """Print what torch's layers print."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


@dataclass(frozen=True)
class Frozen(Method):
    """Keep the running statistics for good: the network no longer depends on the batch, in training too.

    Args:
        trainable: whether γ and β go on learning, the usual recipe for small batches.

    """

    name = "frozen"
    title = "Frozen Batch Normalization"
    citation = "He et al., 2016, arXiv:1512.03385"
    batch_independent = True
    carries_parameters = True
    carries_statistics = True

    trainable: bool = False

    @property
    def exact(self) -> bool:
        """It is the same function in eval mode."""
        return True

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse a layer without running statistics: there is nothing to freeze."""
        if site.track_running_stats:
            return None
        return self.refuse(
            site, "the layer has no running statistics to freeze", "choose group, layer or batch_instance"
        )

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``FrozenBatchNorm`` with the trained γ, β and running statistics."""
        layer = FrozenBatchNorm(old.channels, old.eps, affine=old.has_affine, **old.factory)
        old.carry(layer)
        assert old.running_mean is not None
        assert old.running_var is not None
        layer.running_mean.copy_(old.running_mean)
        layer.running_var.copy_(old.running_var)
        for was, parameter in ((old.weight, layer.weight), (old.bias, layer.bias)):
            # What the user froze stays frozen; the buffers of an already frozen layer may learn again.
            may_learn = not isinstance(was, nn.Parameter) or was.requires_grad
            if parameter is not None:
                parameter.requires_grad_(self.trainable and may_learn)
        return Built(layer)
