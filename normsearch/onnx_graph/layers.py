"""The eval function of each layer as ONNX operators: the layers' own numbers, written with other words."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor, nn

from normsearch.errors import ModelError
from normsearch.methods import (
    BatchInstanceNorm,
    BatchRenorm,
    ChannelAffine,
    ChannelLayerNorm,
    EvoNormS0,
    FilterResponseNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    InstanceBatchNorm,
    MeanOnlyBatchNorm,
    SampleRMSNorm,
    SparseSwitchableNorm,
    SwitchableNorm,
)
from normsearch.onnx_graph.emitting import Emitter

#: The first opsets with each operator: GroupNormalization of opset 18 scales per group, not per channel,
#: and was withdrawn.
GROUP_NORM, LAYER_NORM = 21, 17
_LEAST_INSTANCE_RANK = 3

Emit = Callable[[Emitter, ir.Value, nn.Module], ir.Value]


def emit(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    """Make the nodes of a layer's eval function and return their output; x itself of an identity.

    Statistics of half-precision inputs are computed in single precision, as the layers do.

    Raises:
        ModelError: the layer's class is not known here.

    """
    made = LAYERS.get(type(layer))
    if made is None:
        raise ModelError(
            f"{type(layer).__name__} is not known in ONNX operators; choose another method for {e.path!r}"
        )
    if isinstance(layer, nn.Identity) or not e.is_half or made in (_affine, _instance_norm, _group_norm):
        return made(e, x, layer)
    half, e.dtype = e.dtype, ir.DataType.FLOAT
    wide = made(e, e.op("Cast", x, to=ir.DataType.FLOAT), layer)
    e.dtype = half
    return e.op("Cast", wide, to=half)


def _identity(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    return x


def _affine(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    """A scale and a shift per channel: the eval function of what normalizes by running statistics alone."""
    scale, shift = eval_affine(layer)
    return _shifted(e, _scaled(e, x, scale), shift)


def eval_affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift per channel of a layer that is affine in eval mode, by its own forward."""
    parameter = next(p for p in (*layer.parameters(), *layer.buffers()) if p.dim() == 1)
    channels = len(parameter)
    probe = torch.zeros(2, channels, 1, 1, dtype=torch.float64)
    probe[1] = 1
    with torch.no_grad():
        zero, one = layer.eval()(probe).flatten(1)
    return one - zero, zero


def _scaled(e: Emitter, x: ir.Value, scale: Tensor | None) -> ir.Value:
    return x if scale is None else e.op("Mul", x, e.per_channel("scale", scale))


def _shifted(e: Emitter, x: ir.Value, shift: Tensor | None) -> ir.Value:
    return x if shift is None else e.op("Add", x, e.per_channel("bias", shift))


def _ones(e: Emitter, name: str, count: int, value: float) -> ir.Value:
    return e.constant(name, torch.full((count,), value, dtype=torch.float64))


def _parameter(e: Emitter, name: str, value: Tensor | None, count: int, neutral: float) -> ir.Value:
    return _ones(e, name, count, neutral) if value is None else e.constant(name, value)


def _group_norm(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, nn.GroupNorm)
    groups, channels, double = layer.num_groups, layer.num_channels, e.dtype == ir.DataType.DOUBLE
    if groups == channels and e.rank >= _LEAST_INSTANCE_RANK and not double:
        return _instance_norm(e, x, layer)
    if groups == 1 and e.opset >= LAYER_NORM and not double:
        shape = (channels, *(1 for _ in e.spatial))
        weight, bias = (
            torch.full((channels,), neutral) if value is None else value
            for value, neutral in ((layer.weight, 1.0), (layer.bias, 0.0))
        )
        scale, shift = e.constant("scale", weight.reshape(shape)), e.constant("bias", bias.reshape(shape))
        return e.op("LayerNormalization", x, scale, shift, axis=1, epsilon=layer.eps)
    if e.opset >= GROUP_NORM and not double:
        weight_value = _parameter(e, "scale", layer.weight, channels, 1.0)
        bias_value = _parameter(e, "bias", layer.bias, channels, 0.0)
        return e.op("GroupNormalization", x, weight_value, bias_value, num_groups=groups, epsilon=layer.eps)
    shape_of_x = e.op("Shape", x)
    rows = e.op("Reshape", x, e.whole("groups", (0, groups, -1)))
    if double:
        # Runtimes have InstanceNormalization in single precision only.
        normalized = _standardized(e, rows, [2], layer.eps)
    else:
        ones, zeros = _ones(e, "ones", groups, 1.0), _ones(e, "zeros", groups, 0.0)
        normalized = e.op("InstanceNormalization", rows, ones, zeros, epsilon=layer.eps)
    back = e.op("Reshape", normalized, shape_of_x)
    return _shifted(e, _scaled(e, back, layer.weight), layer.bias)


def _standardized(e: Emitter, x: ir.Value, axes: list[int], eps: float) -> ir.Value:
    """(x − mean) / √(variance + eps) over axes, with the variance of what is centred."""
    centred = e.op("Sub", x, e.mean(x, axes))
    variance = e.mean(e.op("Mul", centred, centred), axes)
    return e.op("Mul", centred, e.inverse_deviation(variance, eps))


def _instance_norm(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d | nn.GroupNorm)
    channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
    if e.dtype == ir.DataType.DOUBLE:
        return _shifted(e, _scaled(e, _standardized(e, x, e.spatial, layer.eps), layer.weight), layer.bias)
    weight = _parameter(e, "scale", layer.weight, channels, 1.0)
    bias = _parameter(e, "bias", layer.bias, channels, 0.0)
    return e.op("InstanceNormalization", x, weight, bias, epsilon=layer.eps)


def _channel_layer_norm(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, ChannelLayerNorm)
    if e.opset < LAYER_NORM or e.dtype == ir.DataType.DOUBLE:
        return _shifted(e, _scaled(e, _standardized(e, x, [1], layer.eps), layer.weight), layer.bias)
    weight = _parameter(e, "scale", layer.weight, layer.num_features, 1.0)
    bias = _parameter(e, "bias", layer.bias, layer.num_features, 0.0)
    if e.rank == 2:
        return e.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=layer.eps)
    last = [0, *e.spatial, 1]
    rows = e.op("Transpose", x, perm=last)
    y = e.op("LayerNormalization", rows, weight, bias, axis=-1, epsilon=layer.eps)
    return e.op("Transpose", y, perm=[0, e.rank - 1, *range(1, e.rank - 1)])


def _rms(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, SampleRMSNorm)
    square = e.mean(e.op("Mul", x, x), [1, *e.spatial])
    y = e.op("Mul", x, e.inverse_deviation(square, layer.eps))
    return _shifted(e, _scaled(e, y, layer.weight), layer.bias)


def _filter_response(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, FilterResponseNorm)
    square = e.mean(e.op("Mul", x, x), e.spatial)
    y = e.op("Mul", x, e.inverse_deviation(square, layer.eps))
    y = _shifted(e, _scaled(e, y, layer.weight), layer.bias)
    return y if layer.tau is None else e.op("Max", y, e.per_channel("threshold", layer.tau))


def _evonorm(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, EvoNormS0)
    shape_of_x = e.op("Shape", x)
    gated = e.op("Mul", x, e.op("Sigmoid", e.op("Mul", x, e.per_channel("gate", layer.v))))
    rows, top = (e.op("Reshape", part, e.whole("groups", (0, layer.groups, -1))) for part in (x, gated))
    centred = e.op("Sub", rows, e.mean(rows, [2]))
    variance = e.mean(e.op("Mul", centred, centred), [2])
    divided = e.op("Mul", top, e.inverse_deviation(variance, layer.eps))
    y = e.op("Reshape", divided, shape_of_x)
    return _shifted(e, _scaled(e, y, layer.weight), layer.bias)


class _Moments:
    """Means and variances of each channel of each sample, and of each sample, with size one in space."""

    def __init__(self, e: Emitter, x: ir.Value) -> None:
        if e.spatial:
            self.mean = e.mean(x, e.spatial)
            centred = e.op("Sub", x, self.mean)
            self.variance = e.mean(e.op("Mul", centred, centred), e.spatial)
        else:
            self.mean = x
            self.variance = e.op("Sub", x, x)

    def of_samples(self, e: Emitter) -> tuple[ir.Value, ir.Value]:
        """Return μ = mean_c m and σ² = mean_c v + mean_c (m − μ)²."""
        mean = e.mean(self.mean, [1])
        off = e.op("Sub", self.mean, mean)
        return mean, e.mean(e.op("Add", self.variance, e.op("Mul", off, off)), [1])


def _normalized(e: Emitter, x: ir.Value, mean: ir.Value, variance: ir.Value, layer: nn.Module) -> ir.Value:
    """Γ (x − mean) / √(variance + eps) + β."""
    y = e.op("Mul", e.op("Sub", x, mean), e.inverse_deviation(variance, float(layer.eps)))  # type: ignore[arg-type]
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return _shifted(e, _scaled(e, y, weight), bias)


def _instance_batch(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, InstanceBatchNorm)
    moments, half = _Moments(e, x), layer.num_features // 2
    own = torch.zeros(layer.num_features, dtype=torch.float64)
    own[:half] = 1
    share = e.per_channel("instance", own)
    mixed = [
        e.op("Add", e.op("Mul", of_x, share), e.per_channel(name, running.double() * (1 - own)))
        for name, of_x, running in zip(
            ("mean", "variance"), (moments.mean, moments.variance), layer.running(), strict=True
        )
    ]
    return _normalized(e, x, mixed[0], mixed[1], layer)


def _switchable(e: Emitter, x: ir.Value, layer: nn.Module) -> ir.Value:
    assert isinstance(layer, SwitchableNorm | SparseSwitchableNorm)
    moments = _Moments(e, x)
    whole = moments.of_samples(e)
    mixed = []
    for name, own, of_sample, running, shares in zip(
        ("mean", "variance"),
        (moments.mean, moments.variance),
        whole,
        layer.running(),
        layer.mixtures(torch.float64).detach(),
        strict=True,
    ):
        parts = (
            e.op("Mul", own, e.scalar(f"{name}_instance", float(shares[0]))),
            e.op("Mul", of_sample, e.scalar(f"{name}_layer", float(shares[1]))),
        )
        batch = e.per_channel(name, running.double() * shares[2])
        mixed.append(e.op("Add", e.op("Add", *parts), batch))
    return _normalized(e, x, mixed[0], mixed[1], layer)


#: How each class of layer is written; a method may build no other.
LAYERS: dict[type[nn.Module], Emit] = {
    nn.Identity: _identity,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    ChannelLayerNorm: _channel_layer_norm,
    SampleRMSNorm: _rms,
    FilterResponseNorm: _filter_response,
    EvoNormS0: _evonorm,
    InstanceBatchNorm: _instance_batch,
    SwitchableNorm: _switchable,
    SparseSwitchableNorm: _switchable,
    FrozenBatchNorm: _affine,
    ChannelAffine: _affine,
    MeanOnlyBatchNorm: _affine,
    BatchRenorm: _affine,
    GhostBatchNorm: _affine,
    # As it is built from a trained layer: all of it batch, none of it instance.
    BatchInstanceNorm: _affine,
}
