"""convert_state_dict: a state dict of the original carried into the form of its converted model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from normsearch.dataflow import Producer
from normsearch.errors import StateError
from normsearch.methods import Method, TrainedNorm
from normsearch.plans import Plan
from normsearch.sites import NormSite
from normsearch.surgery import in_order

_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert_state_dict(state_dict: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Carry a BatchNorm state dict of the same architecture into its converted form.

    Args:
        state_dict: of the model before conversion, for example another training run's.
        plan: the plan that converted the model.

    Returns:
        A state dict that loads strictly into the converted model; other entries are the same tensors.

    Raises:
        StateError: an entry is missing or has another shape.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> plan = normsearch.plan(model, "group")
        >>> converted = normsearch.convert(model, plan)
        >>> converted.load_state_dict(normsearch.convert_state_dict(model.state_dict(), plan))
        <All keys matched successfully>

    """
    result = dict(state_dict)
    for site, method in in_order(plan):
        if site.kind == "weight":
            _convert_layer(result, site, method, TrainedNorm.absent(site), [])
            continue
        prefixes = _prefixes(site.path, site.aliases)
        present = [prefix for prefix in prefixes if any(f"{prefix}{name}" in state_dict for name in _STATE)]
        if not present and (site.affine or site.track_running_stats):
            raise StateError(
                f"the state dict has no entry for {site.path}; give one saved from the model that the plan "
                "was made for (a wrapper's prefix such as module. must match too)"
            )
        # A layer under several names is one layer: it is built, and folded into its producer, once.
        places = present or prefixes[:1]
        _convert_layer(result, site, method, _trained(state_dict, places[0], site), places)
    return result


def _prefixes(path: str, aliases: tuple[str, ...]) -> list[str]:
    return [f"{name}." if name else "" for name in (path, *aliases)]


def _trained(state_dict: Mapping[str, Tensor], prefix: str, site: NormSite) -> TrainedNorm:
    old = TrainedNorm.from_state_dict(state_dict, prefix, site)
    if site.affine:
        return old
    if site.trained is False and old.trained:
        raise StateError(
            f"the plan was made while {site.path} was untrained, so its new layer has no affine to hold the "
            "statistics of this state dict; load it into the original model, then plan and convert"
        )
    return old if site.trained is False else replace(old, trained=True)


def _convert_layer(
    result: dict[str, Tensor], site: NormSite, method: Method, old: TrainedNorm, prefixes: list[str]
) -> None:
    """Replace the entries of one site, and of its producer where the method rewrites that."""
    producer = None
    if method.rewrites_producer(site) and site.producer is not None:
        producer = _layer(result, site.producer)
    built = method.build(site, old, producer)
    for prefix in prefixes:
        for name in _STATE:
            result.pop(f"{prefix}{name}", None)
        inner = f"{prefix}norm." if site.activation is not None else prefix
        _write(result, inner, built.module)
    rewritten = built.module if site.kind == "weight" else built.producer
    if rewritten is not None and site.producer is not None:
        for where in _prefixes(site.producer.path, site.producer.aliases):
            if result.pop(f"{where}weight", None) is not None:
                result.pop(f"{where}bias", None)
                _write(result, where, rewritten)


def _write(result: dict[str, Tensor], prefix: str, layer: nn.Module) -> None:
    result.update({f"{prefix}{name}": value.detach() for name, value in layer.state_dict().items()})


def _layer(state_dict: Mapping[str, Tensor], producer: Producer) -> nn.Module | None:
    """Return a layer with the producer's entries; None if its weight was rewritten already."""
    prefix = next((p for p in _prefixes(producer.path, producer.aliases) if f"{p}weight" in state_dict), None)
    if prefix is None:
        return None
    weight, bias = state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}bias")
    layer: nn.Module
    if weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    else:
        kind = "ConvTranspose" if producer.transposed else "Conv"
        ends = [weight.shape[0], weight.shape[1] * producer.groups]
        if not producer.transposed:
            ends = [weight.shape[1] * producer.groups, weight.shape[0]]
        cls = getattr(nn, f"{kind}{weight.dim() - 2}d")
        layer = cls(*ends, tuple(weight.shape[2:]), groups=producer.groups, device="meta")
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer
