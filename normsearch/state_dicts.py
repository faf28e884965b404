"""convert_state_dict: a state dict of the original carried into the form of its converted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from normsearch.dataflow import Producer
from normsearch.errors import StateError
from normsearch.methods import Method, TrainedNorm
from normsearch.plans import Plan
from normsearch.sites import STATE, NormSite
from normsearch.surgery import in_order


def convert_state_dict(state_dict: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Carry a BatchNorm state dict of the same architecture into its converted form.

    Args:
        state_dict: of the model before conversion, for example another training run's.
        plan: the plan that converted the model.

    Returns:
        A state dict that loads strictly into the converted model; other entries are the same tensors.

    Raises:
        StateError: an entry is missing or has another shape, a site has no entries of its own (an
            F.batch_norm call), or the plan names another producer than the state dict has.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> plan = normsearch.plan(model, "group")
        >>> converted = normsearch.convert(model, plan)
        >>> converted.load_state_dict(normsearch.convert_state_dict(model.state_dict(), plan))
        <All keys matched successfully>

    """
    result = dict(state_dict)
    rewritten: set[str] = set()
    for site, method in in_order(plan):
        if site.kind == "weight":
            _convert_layer(result, site, method, TrainedNorm.absent(site), [], rewritten)
            continue
        if site.kind == "functional":
            raise StateError(
                f"{site.path} is a call of F.batch_norm, which the graph it became renamed: load the state "
                "dict into the original model, then convert that"
            )
        prefixes = _prefixes(site.path, site.aliases)
        present = [prefix for prefix in prefixes if any(f"{prefix}{name}" in state_dict for name in STATE)]
        if not present and (site.affine or site.track_running_stats):
            raise StateError(
                f"the state dict has no entry for {site.path}; give one saved from the model that the plan "
                "was made for (a wrapper's prefix such as module. must match too)"
            )
        # A layer under several names is one layer: it is built, and folded into its producer, once.
        places = present or prefixes[:1]
        _same_layer(state_dict, places, STATE)
        _convert_layer(result, site, method, _trained(state_dict, places[0], site), places, rewritten)
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


def _same_layer(state_dict: Mapping[str, Tensor], prefixes: list[str], names: Sequence[str]) -> None:
    """Raise unless what the plan calls one layer under several names is one in the state dict too."""
    for prefix in prefixes[1:]:
        for name in names:
            first, other = state_dict.get(f"{prefixes[0]}{name}"), state_dict.get(f"{prefix}{name}")
            if first is not None and other is not None and not torch.equal(first, other):
                raise StateError(
                    f"the plan says that {prefixes[0]}{name} and {prefix}{name} are one, and the state dict "
                    "has two; give one saved from the model that the plan was made for"
                )


def _convert_layer(
    result: dict[str, Tensor],
    site: NormSite,
    method: Method,
    old: TrainedNorm,
    prefixes: list[str],
    rewritten: set[str],
) -> None:
    """Replace the entries of one site, and of its producer where the method rewrites that."""
    producer = None
    if method.rewrites_producer(site) and site.producer is not None and site.producer.path not in rewritten:
        producer = _layer(result, site, site.producer)
    built = method.build(site, old, producer)
    for prefix in prefixes:
        for name in STATE:
            result.pop(f"{prefix}{name}", None)
        inner = f"{prefix}norm." if site.activation is not None else prefix
        _write(result, inner, built.module)
    new_producer = built.module if site.kind == "weight" else built.producer
    if new_producer is not None and site.producer is not None:
        # A layer that merely took the scale up has a weight as before and may be rewritten by another site.
        if "weight" not in new_producer.state_dict():
            rewritten.add(site.producer.path)
        for where in _prefixes(site.producer.path, site.producer.aliases):
            if result.pop(f"{where}weight", None) is not None:
                result.pop(f"{where}bias", None)
                _write(result, where, new_producer)


def _write(result: dict[str, Tensor], prefix: str, layer: nn.Module) -> None:
    result.update({f"{prefix}{name}": value.detach() for name, value in layer.state_dict().items()})


def _layer(state_dict: Mapping[str, Tensor], site: NormSite, producer: Producer) -> nn.Module:
    """Return a layer with the producer's entries.

    Raises:
        StateError: the state dict has no such layer, or one whose channels are not the site's.

    """
    prefixes = _prefixes(producer.path, producer.aliases)
    present = [prefix for prefix in prefixes if f"{prefix}weight" in state_dict]
    if not present:
        raise StateError(
            f"the state dict has no {prefixes[0]}weight, into which the plan folds {site.path}; give one "
            "saved from the model that the plan was made for"
        )
    _same_layer(state_dict, present, ("weight", "bias"))
    weight, bias = state_dict[f"{present[0]}weight"], state_dict.get(f"{present[0]}bias")
    channels = weight.shape[1] * producer.groups if producer.transposed else weight.shape[0]
    if weight.dim() < 2 or (producer.foldable and channels != site.channels):
        raise StateError(
            f"{present[0]}weight has shape {tuple(weight.shape)}, which does not give the {site.channels} "
            f"channels of {site.path}; the plan or the state dict belongs to another model"
        )
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
