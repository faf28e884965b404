"""What a few inputs tell without gradients: whitening into the layer before, least squares per channel."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.methods import TrainedNorm
from normsearch.methods.upstream import folded_bias
from normsearch.pairing import Pair, SitePair
from normsearch.progress import Stage
from normsearch.reparametrization import per_output


def has_channel_affine(layer: nn.Module) -> bool:
    """Whether a layer ends with a scale and a shift per channel."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return weight is not None and bias is not None and weight.dim() == 1 and weight.shape == bias.shape


def whitenable(pair: Pair) -> dict[str, SitePair]:
    """Return the sites whose input can be whitened by the layer before: as trained, and read there alone."""
    found = {}
    for path, site in pair.sites.items():
        producer = site.site.producer
        if producer is None or not producer.foldable or not site.site.trained:
            continue
        # A layer with statistics of its own undoes what is done to its input, or is exact already.
        if not has_channel_affine(site.new) or "running_mean" in site.new._buffers:
            continue
        before, after = (model.get_submodule(producer.path) for model in (pair.original, pair.network))
        weights = [layer._parameters.get("weight") for layer in (before, after)]
        if type(before) is type(after) and weights[0] is not None and weights[1] is not None:
            found[path] = site
    return found


@torch.no_grad()
def whiten(pair: Pair, batches: Iterable[Any], stage: Stage) -> tuple[str, ...]:
    """Whiten sites by the running statistics where that reproduces the original's output better.

    x̂ = (x − μ) / √(σ² + eps) goes into the weight and bias of the layer before, which may gain a bias; the
    new layer then has the original's γ and β. Sites are decided in one pass, each after those before it.

    Returns:
        The paths of the whitened sites.

    """
    candidates = whitenable(pair)
    affines = {path: _whitening(site) for path, site in candidates.items()}
    layers = {path: _with_affine_of(site) for path, site in candidates.items()}
    losses = {path: [0.0, 0.0] for path in candidates}

    def visit(path: str, x: Tensor, output: Tensor, target: Tensor) -> Tensor | None:
        if path not in candidates:
            return None
        scale, shift = (along(part, x) for part in affines[path])
        whitened: Tensor = layers[path].forward((x * scale + shift).to(x.dtype))
        for index, result in enumerate((output, whitened)):
            losses[path][index] += float((result - target).double().square().sum())
        return whitened if losses[path][1] < losses[path][0] else None

    for inputs in batches:
        pair.run(inputs, visit)
        stage.advance()
    chosen = tuple(path for path, (folded, whitened) in losses.items() if whitened < folded)
    for path in chosen:
        _fold_whitening(pair, candidates[path], *affines[path], layers[path])
    return chosen


def _whitening(site: SitePair) -> tuple[Tensor, Tensor]:
    mean, variance = TrainedNorm.of(site.old, site.site).statistics()
    scale = (variance + site.site.eps).rsqrt()
    return scale, -mean * scale


def _with_affine_of(site: SitePair) -> nn.Module:
    """Return the new layer with the original's γ and β, which fit an input of mean 0 and variance 1."""
    layer = copy.deepcopy(site.new)
    for name, neutral in (("weight", 1.0), ("bias", 0.0)):
        value = getattr(site.old, name, None)
        own = layer.get_parameter(name)
        own.copy_(torch.full_like(own, neutral) if value is None else value.detach())
    return layer


def _fold_whitening(pair: Pair, site: SitePair, scale: Tensor, shift: Tensor, layer: nn.Module) -> None:
    assert site.site.producer is not None
    producer = pair.network.get_submodule(site.site.producer.path)
    weight = producer.get_parameter("weight")
    bias = folded_bias(producer, TrainedNorm.of(site.old, site.site), scale, shift)
    weight.copy_(weight.double() * per_output(scale, producer, weight))
    if producer._parameters.get("bias") is None:
        producer.register_parameter("bias", bias)
    else:
        producer.get_parameter("bias").copy_(bias)
    for name in ("weight", "bias"):
        site.new.get_parameter(name).copy_(layer.get_parameter(name))


@torch.no_grad()
def least_squares(pair: Pair, batches: Iterable[Any], stage: Stage) -> None:
    """Fit γ and β of every site by least squares to the original's output at that site.

    Per channel (a, b) minimise Σ (a y + b − t)² over samples and positions, from running sums, and γ ← a γ,
    β ← a β + b. Data flows through the layers as fitted so far, so a site sees what those before it became.
    """
    totals: dict[str, Tensor] = {}

    def visit(path: str, x: Tensor, output: Tensor, target: Tensor) -> Tensor | None:
        if not has_channel_affine(pair.sites[path].new):
            return None
        rows = [part.double().transpose(0, 1).flatten(1) for part in (output, target)]
        new = sums(*rows)
        totals[path] = totals[path] + new if path in totals else new
        scale, shift = (along(part, output) for part in line(totals[path]))
        return (output * scale + shift).to(output.dtype)

    for inputs in batches:
        pair.run(inputs, visit)
        stage.advance()
    for path, total in totals.items():
        scale, shift = line(total)
        weight, bias = (pair.sites[path].new.get_parameter(name) for name in ("weight", "bias"))
        bias.copy_(scale * bias.double() + shift)
        weight.copy_(scale * weight.double())


def sums(y: Tensor, t: Tensor) -> Tensor:
    """Sums over each row: of 1, y, t, y², y t and t², shape (6, C)."""
    ones = torch.ones_like(y)
    return torch.stack([part.sum(1) for part in (ones, y, t, y * y, y * t, t * t)])


def line(total: Tensor) -> tuple[Tensor, Tensor]:
    """Return slope and intercept of the regression of t on y per channel; 1 where y is constant."""
    count, y, t, yy, yt, _ = total
    y, t = y / count, t / count
    variance = yy / count - y * y
    constant = variance <= 1e-12 * (1 + y * y)
    slope = torch.where(constant, 1.0, (yt / count - y * t) / torch.where(constant, 1.0, variance))
    return slope, t - slope * y


def residual(total: Tensor) -> float:
    """Return Σ (a y + b − t)² over all channels, with the line of each."""
    count, y, t, yy, yt, tt = total
    a, b = line(total)
    return float((a * a * yy + count * b * b + tt + 2 * (a * b * y - a * yt - b * t)).sum().clamp_min(0))


def along(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector of one number per channel in a shape that multiplies ``x``, at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return vector.to(wide).reshape(1, -1, *(1 for _ in x.shape[2:]))
