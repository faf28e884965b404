"""Filter response normalization with its thresholded linear unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.errors import ShapeError
from normsearch.methods.base import Built, ElementGuard, Method, Refusal, TrainedNorm
from normsearch.methods.group import affine_note
from normsearch.methods.running import check_input, make_affine, reset_affine
from normsearch.moments import ClosedRule, normalize
from normsearch.sites import NormSite

#: What max(y, 0) is; the clipped variants above zero (ReLU6) are not.
_RELU = "torch.nn.modules.activation.ReLU"


class FilterResponseNorm(nn.Module):
    """Divide each channel of each sample by its root mean square over space, then clip from below.

    y = max(γ x / √(ν² + eps) + β, τ) with ν² the mean of x² over space, τ per channel and learned. The paper
    learns eps where a map has one element; there x / √(x² + eps) is hardly more than the sign of x, and this
    layer refuses such inputs.

    Args:
        num_features: C of an input (N, C, *spatial).
        eps: added to ν².
        affine: whether there are γ and β of shape (C,).
        threshold: whether there is τ of shape (C,), zero at the start.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ShapeError: an input with one element per sample and channel.

    Source: Singh and Krishnan, 2019, arXiv:1911.09737.

    Example:
        >>> y = FilterResponseNorm(8)(torch.randn(2, 8, 4, 4)).detach()
        >>> y.shape, float(y.min())
        (torch.Size([2, 8, 4, 4]), 0.0)

    """

    weight: Tensor | None
    bias: Tensor | None
    tau: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        threshold: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_features, self.eps, self.affine, self.threshold = num_features, eps, affine, threshold
        make_affine(self, num_features, affine, factory)
        tau = nn.Parameter(torch.empty(num_features, **factory)) if threshold else None
        self.register_parameter("tau", tau)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to one, β and τ to zero."""
        reset_affine(self)
        if self.tau is not None:
            nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        if x.shape[2:].numel() == 1:
            raise ShapeError(
                "FilterResponseNorm needs more than one element per sample and channel, got "
                f"{tuple(x.shape)}: of a single one little more than the sign would be left; use group, "
                "layer or frozen for this site"
            )
        y, _ = normalize(x, _RootMeanSquare(self))
        return y

    def extra_repr(self) -> str:
        """Print what this layer has."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, threshold={self.threshold}"


class _RootMeanSquare(ClosedRule):
    """Scale = γ/√(v + m² + eps), shift = m·scale + β, so that y = x·scale + β; clipped to τ from below."""

    def __init__(self, layer: FilterResponseNorm) -> None:
        self.layer = layer
        self.parameters = (layer.weight, layer.bias)
        self.floor = layer.tau

    def __call__(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return scale and shift."""
        layer = self.layer
        self.mean = mean
        self.inverse = torch.addcmul(variance, mean, mean).add(layer.eps).rsqrt()
        self.scale = self.inverse if layer.weight is None else self.inverse * layer.weight
        shift = mean * self.scale
        return self.scale, shift if layer.bias is None else shift + layer.bias, None

    def gradient(
        self, of_scale: Tensor, of_shift: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the gradients of the moments, γ and β."""
        layer = self.layer
        # Σ dy x/√(ν² + eps): that of γ, once summed.
        through = torch.addcmul(of_scale, of_shift, self.mean).mul_(self.inverse)
        of_variance = (through * self.scale).mul_(self.inverse).mul_(-0.5)
        of_weight, of_bias = (
            None if parameter is None else part.sum(0).to(parameter.dtype)
            for part, parameter in ((through, layer.weight), (of_shift, layer.bias))
        )
        # The shift's m undoes the one of x − m: the mean only acts through ν² = v + m².
        return (self.mean * of_variance).mul_(2), of_variance, (of_weight, of_bias)


@dataclass(frozen=True)
class FilterResponse(Method):
    """Normalize each channel of each sample by its root mean square over space; the mean is kept.

    The paper's thresholded linear unit max(y, τ) takes the place of the ReLU that follows, from τ = 0 on,
    where nothing else reads the site. Elsewhere there is no threshold: in front of a ReLU that stays it would
    get no gradient, and in front of anything else it would change the function.
    """

    name = "filter_response"
    title = "Filter Response Normalization"
    citation = "Singh and Krishnan, 2019, arXiv:1911.09737"
    batch_independent = True
    activates = True

    @property
    def exact(self) -> bool:
        """Statistics of a sample replace those of the training set."""
        return False

    def absorbs(self, site: NormSite) -> bool:
        """Whether a ReLU follows and can be taken out."""
        return site.followed_by is not None and site.followed_by.removable and site.followed_by.layer == _RELU

    def refusal(self, site: NormSite) -> Refusal | None:
        """Refuse maps of one element and inputs without space, of which the sign would be left."""
        if site.fewest_elements != 1:
            return None
        return self.refuse(
            site,
            "over a single element, x/√(x² + eps) is little more than the sign of x",
            "choose group, layer or frozen",
        )

    def notes(self, site: NormSite) -> tuple[str, ...]:
        """Say where an affine is added, what becomes of the activation, and where the shape is not known."""
        found = [*affine_note(site), activation_note(self, site, "has no threshold")]
        if site.fewest_elements is None:
            found.append("the input's shape is unknown: checked at run time")
        return tuple(found)

    @torch.no_grad()
    def build(self, site: NormSite, old: TrainedNorm, producer: nn.Module | None = None) -> Built:
        """Return a ``FilterResponseNorm`` with ν² = σ² + μ² folded into γ and β."""
        threshold = self.absorbs(site)
        layer = FilterResponseNorm(
            old.channels, old.eps, affine=old.needs_affine, threshold=threshold, **old.factory
        )
        if old.needs_affine:
            mean, variance = old.statistics()
            old.fold(layer, torch.zeros_like(mean), variance + mean.square())
        if layer.tau is not None:
            layer.tau.requires_grad_(old.trainable)
        if site.fewest_elements is None:
            consequence = "of which little more than the sign would be left"
            layer.register_forward_pre_hook(ElementGuard(site.path, str(self), 1, consequence))
        return Built(layer)


def activation_note(method: Method, site: NormSite, otherwise: str) -> str:
    """Say whether the layer takes the place of the activation that follows; if not, why, and what then."""
    act = site.followed_by
    if act is None:
        return f"no activation is known to follow: the layer {otherwise}"
    name = act.layer.rpartition(".")[2]
    where = f" ({act.path})" if act.path else ""
    if method.absorbs(site):
        return f"takes the place of the {name} that follows{where}"
    why = f", because {act.detail}" if act.detail else ""
    return f"the {name} that follows{where} stays{why}: the layer {otherwise}"
