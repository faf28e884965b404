"""What the weight-space methods share: the layer upstream takes the scale, or an affine stays at the site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normsearch.dataflow import REMOVAL
from normsearch.methods.base import Method, Refusal, TrainedNorm
from normsearch.methods.running import check_input, make_affine, reset_affine
from normsearch.reparametrization import per_output, shallow_copy
from normsearch.sites import NormSite


class ChannelAffine(nn.Module):
    """A trainable scale and shift per channel: y = γ x + β.

    Args:
        num_features: C of an input (N, C) or (N, C, *spatial).
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> ChannelAffine(3)(torch.ones(1, 3)).tolist()
        [[1.0, 1.0, 1.0]]

    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        make_affine(self, num_features, True, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to one and β to zero."""
        reset_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (N, C, *spatial)."""
        check_input(self, x, self.num_features)
        shape = (-1, *(1 for _ in x.shape[2:]))
        return (x * self.weight.reshape(shape) + self.bias.reshape(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        """Print the number of channels."""
        return f"{self.num_features}"


def scale_and_shift(old: TrainedNorm) -> tuple[Tensor, Tensor]:
    """Return BatchNorm's eval function y = s x + t: s = γ / √(σ² + eps), t = β − s μ, in double precision."""
    mean, variance = old.statistics()
    scale = (variance + old.eps).rsqrt()
    if old.weight is not None:
        scale = scale * old.weight.detach().double()
    shift = -mean * scale
    return scale, shift if old.bias is None else shift + old.bias.detach().double()


def affine_at_site(old: TrainedNorm) -> ChannelAffine:
    """Return the eval function as a layer of its own."""
    layer = ChannelAffine(old.channels, **old.factory)
    values = dict(zip(("weight", "bias"), scale_and_shift(old), strict=True))
    for name, value in values.items():
        before = getattr(old, name)
        trainable = old.trainable if before is None else before.requires_grad
        layer.register_parameter(name, nn.Parameter(value.to(**old.factory), requires_grad=trainable))
    return layer


def folded_bias(producer: nn.Module, old: TrainedNorm, scale: Tensor, shift: Tensor | float) -> nn.Parameter:
    """Return the producer's bias after its output was scaled and shifted: s b + t."""
    weight, bias = next(iter(producer.parameters())), producer._parameters.get("bias")
    value = shift + (scale * bias.detach().double() if bias is not None else torch.zeros_like(scale))
    before = old.bias if bias is None else bias
    trainable = old.trainable if before is None else before.requires_grad or old.trainable
    return nn.Parameter(value.to(weight.dtype), requires_grad=trainable)


def foldable(site: NormSite) -> bool:
    """Tell whether the producer may take over the site's scale and shift."""
    return site.producer is not None and site.producer.foldable


def upstream_notes(site: NormSite) -> tuple[str, ...]:
    """Say why an affine stays at the site."""
    if site.producer is None or site.producer.foldable or site.kind == "weight":
        return ()
    return (f"a scale and a shift per channel stay: {site.producer.path}: {site.producer.detail}",)


def fold_into(producer: nn.Module, old: TrainedNorm, scale: Tensor, shift: Tensor) -> nn.Module:
    """Return the producer with its outputs scaled and shifted per channel: W' = s W, b' = s b + t."""
    weight = producer.get_parameter("weight")
    folded: nn.Module = shallow_copy(producer)
    scaled = (weight.double() * per_output(scale, producer, weight)).to(weight.dtype)
    folded.register_parameter("weight", nn.Parameter(scaled, requires_grad=weight.requires_grad))
    folded.register_parameter("bias", folded_bias(producer, old, scale, shift))
    return folded


def upstream_refusal(method: Method, site: NormSite) -> Refusal | None:
    """Refuse a site whose statistics cannot be folded, or without any weight upstream."""
    if site.kind == "weight":
        return None
    if not site.track_running_stats:
        return method.refuse(
            site,
            "the layer has no running statistics to fold into a weight",
            "choose group, layer or batch_instance",
        )
    return producer_refusal(method, site, "frozen")


def producer_refusal(method: Method, site: NormSite, instead: str) -> Refusal | None:
    """Refuse a site that no weight is known to feed, or one that is computed from others already."""
    if site.producer is None:
        remedy = f"choose {instead}"
        if site.calls is None:
            remedy += ", or give inputs=: a forward pass shows what feeds a site that tracing does not reach"
        return method.refuse(site, "no convolution or linear layer is known to feed it", remedy)
    if not site.producer.plain:
        removal = REMOVAL.get(site.producer.detail or "")
        first = "give it a plain weight" if removal is None else f"call {removal} on it"
        return method.refuse(
            site,
            f"{site.producer.path}, which feeds it, has no plain weight: {site.producer.detail}",
            f"{first} first, or choose {instead}",
        )
    return None
