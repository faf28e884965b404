"""NormSite and find_sites: where a model normalizes, found without changing or tracing it first."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from normsearch.activations import Activation, activation_inside, find_activations
from normsearch.dataflow import Producer, find_producers, weight_as_site
from normsearch.errors import ModelError
from normsearch.forward import copied, unwrapped
from normsearch.functional import FunctionalCall, find_functional_calls, names_batch_norm
from normsearch.lifting import FunctionalBatchNorm, lifted
from normsearch.observation import Observation, observe
from normsearch.opening import Model, as_module, opening_of
from normsearch.program_layers import Left
from normsearch.readings import readings
from normsearch.reparametrization import out_channels
from normsearch.tracing import WEIGHTED, Traces

Kind = Literal[
    "batch", "sync", "frozen", "lazy", "custom", "parametrized", "scripted", "functional", "weight"
]

#: The forward methods whose meaning is known, by the class that defines them.
_FORWARDS: dict[str, Kind] = {
    "torch.nn.modules.batchnorm._BatchNorm.forward": "batch",
    "torch.nn.modules.batchnorm.SyncBatchNorm.forward": "sync",
    "torchvision.ops.misc.FrozenBatchNorm2d.forward": "frozen",
    "timm.layers.norm_act.BatchNormAct2d.forward": "batch",
    "timm.layers.norm_act.SyncBatchNormAct.forward": "sync",
    "timm.layers.norm_act.FrozenBatchNormAct2d.forward": "frozen",
}
_FUSED = {"drop", "act"}
#: The names of a BatchNorm layer's parameters and buffers.
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_RANKS: dict[type[_BatchNorm], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_ANY_RANK = (2, 3, 4, 5)
_FUNCTION = "torch.nn.functional.batch_norm"


@dataclass(frozen=True, kw_only=True)
class NormSite:
    """One place where a model normalizes, as plain data (no module inside; JSON-ready through ``asdict``).

    Attributes:
        path: the module's path as in ``named_modules()``; the path that a functional call's layer gets, or
            ``owner:batch_norm`` where it cannot become one.
        kind: ``batch``, ``sync`` or ``frozen`` can be converted; ``lazy`` after one forward pass; ``custom``
            (a forward or state of its own), ``parametrized`` and ``scripted`` are reported; ``functional`` is
            an F.batch_norm call, which can be converted unless ``detail`` says why not;
            ``weight`` is a convolution or linear layer without BatchNorm, listed only when asked for.
        layer: the class that stands there, with its module.
        channels: number of channels C; None where it is not known yet.
        eps: the constant added to the variance.
        momentum: the running statistics' step; None means a cumulative average.
        affine: whether it has a weight or a bias.
        bias: whether it has a bias.
        track_running_stats: whether it has running statistics.
        trained: whether its statistics, or its γ and β, are anything but initial values; None where they
            cannot be read (meta device).
        ranks: the numbers of input dimensions the layer accepts.
        input_shapes: the distinct input shapes seen in a forward pass, in order.
        calls: how often one forward pass calls it; None when no inputs were given.
        producer: the nearest convolution or linear layer upstream.
        aliases: further paths of the same module.
        activation: the activation it carries inside (timm's norm + act layers).
        followed_by: the activation that its output goes through, that one or the next.
        tied: full names of parameters elsewhere that are the same object as its weight or bias.
        detail: why a reported site, or one with broken statistics, cannot be converted.
        open_batch: whether it normalizes by the batch in an exported program that takes any batch size.
        read: which of its weight, bias, running_mean and running_var a forward method reads from outside.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> [(site.path, site.channels) for site in normsearch.find_sites(model)]
        [('1', 8)]

    """

    path: str
    kind: Kind
    layer: str
    channels: int | None
    eps: float
    momentum: float | None
    affine: bool
    bias: bool = False
    track_running_stats: bool
    trained: bool | None
    ranks: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...] = ()
    calls: int | None = None
    producer: Producer | None = None
    aliases: tuple[str, ...] = ()
    activation: str | None = None
    followed_by: Activation | None = None
    tied: tuple[str, ...] = ()
    detail: str | None = None
    open_batch: bool = False
    read: tuple[str, ...] = ()

    @property
    def fewest_elements(self) -> int | None:
        """The smallest number of spatial elements seen per sample and channel; None without a shape."""
        return min((math.prod(shape[2:]) for shape in self.input_shapes), default=None)


def find_sites(model: Model, inputs: Any = None, *, weights: bool = False) -> tuple[NormSite, ...]:
    """Find every BatchNorm layer of a model, in the order of ``named_modules()``.

    Modules are walked, so nothing needs to be traceable. Where torch.fx can trace the model, each site
    names the convolution or linear layer that feeds it, and ``F.batch_norm`` calls are found. With
    ``inputs``, one forward pass in eval mode adds shapes and call counts. The model is left as it was.

    Args:
        model: any nn.Module; wrappers (DataParallel, a compiled model) keep their prefix in the paths. Or a
            ``torch.export.ExportedProgram``, whose own metadata tells shapes and calls.
        inputs: one forward pass's inputs: a tuple is ``*args``, a dict ``**kwargs``, anything else
            (a list too) one argument.
        weights: list convolutions and linear layers that feed no BatchNorm too, as sites of kind ``weight``
            for methods that normalize weights.

    Raises:
        ModelError: ``model`` is no module, or fails on ``inputs``.

    """
    return analyse(model, inputs, dataflow=True, weights=weights)


def analyse(
    model: Model, inputs: Any, *, dataflow: bool, weights: bool = False, functional: bool = False
) -> tuple[NormSite, ...]:
    """Do what ``find_sites`` says; the trace for dataflow, the slow part, only where it is asked for.

    ``functional`` says that there are F.batch_norm calls even if no forward method shows them.
    """
    model = as_module(model)
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled TorchScript, whose layers cannot be told apart; "
            "give the nn.Module that it was made from"
        )
    original, model = model, with_calls_lifted(model, certain=functional)
    sites = list(_walk(model))
    modules = {site.path: model.get_submodule(site.path) for site in sites}
    lazy = any(site.kind == "lazy" for site in sites)
    opening = opening_of(model)
    observation = Observation() if opening is None else opening.observation
    if inputs is not None:
        # A forward pass initialises lazy layers, so it runs on a copy of such a model.
        subject = copied(model) if lazy else model
        watched = {path: subject.get_submodule(path) for path in modules}
        observation = observe(unwrapped(subject)[0], inputs, watched)
        if observation.functional and not functional:
            return analyse(original, inputs, dataflow=dataflow, weights=weights, functional=True)
    sites = _with_readings(model, sites, modules)
    if observation.ran:
        sites = [_with_observation(site, observation) for site in sites]
    if opening is not None:
        sites = [replace(site, open_batch=opening.leaves_batch_open(site.path)) for site in sites]
    inner, prefix = unwrapped(model)
    calls = find_functional_calls(inner, prefix, modules.values(), observation)
    if (dataflow or weights) and not lazy:
        traces = Traces(inner, modules.values())
        producers = find_producers(inner, prefix, modules, observation, traces)
        activations = find_activations(inner, prefix, modules, traces)
        sites = [
            replace(
                site,
                producer=producers.get(site.path),
                followed_by=site.followed_by or activations.get(site.path),
            )
            for site in sites
        ]
    left = () if opening is None else opening.left
    listed = (*sites, *(_functional_site(call) for call in calls), *(_left_site(site) for site in left))
    return (*listed, *_weight_sites(model, listed)) if weights else listed


def with_calls_lifted(
    model: nn.Module, *, certain: bool = False, only: Collection[str] | None = None
) -> nn.Module:
    """Return ``model`` with its F.batch_norm calls as modules, where that is safe; else itself."""
    if not certain and not names_batch_norm(model):
        return model
    known = [module for module in model.modules() if _kind(module) is not None]
    graph = lifted(model, known, only)
    return model if isinstance(graph, str) else graph


def _weight_sites(model: nn.Module, sites: tuple[NormSite, ...]) -> Iterator[NormSite]:
    """Yield the weighted layers that no listed site is fed by."""
    feeding = {site.producer.path for site in sites if site.producer is not None}
    names: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WEIGHTED) and module._parameters.get("weight") is not None:
            names[id(module)].append(path)
    for first, *aliases in names.values():
        layer = model.get_submodule(first)
        if first in feeding or is_lazy(layer.get_parameter("weight")):
            continue
        yield NormSite(
            path=first,
            kind="weight",
            layer=f"{type(layer).__module__}.{type(layer).__name__}",
            channels=out_channels(layer),
            eps=0.0,
            momentum=None,
            affine=False,
            track_running_stats=False,
            trained=None,
            ranks=_ANY_RANK,
            producer=weight_as_site(model, first, tuple(aliases)),
            aliases=tuple(aliases),
        )


def _walk(model: nn.Module) -> Iterator[NormSite]:
    paths: dict[int, list[str]] = defaultdict(list)
    found: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _kind(module) is None:
            continue
        found[id(module)] = module
        paths[id(module)].append(path)
    owners: dict[int, list[tuple[int, str]]] = defaultdict(list)
    if found:
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners[id(parameter)].append((id(module), f"{path}.{name}" if path else name))
    for key, module in found.items():
        tied = tuple(
            name
            for parameter in module._parameters.values()
            if parameter is not None
            for owner, name in owners[id(parameter)]
            if owner != key
        )
        first, *aliases = paths[key]
        yield _site(module, first, tuple(aliases), tied)


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, FunctionalBatchNorm):
        return "functional"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted" if "BatchNorm" in getattr(module, "original_name", "") else None
    forward = type(module).forward
    kind = _FORWARDS.get(f"{forward.__module__}.{getattr(forward, '__qualname__', '')}")
    if kind is None and not isinstance(module, _BatchNorm):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy"
    if kind is None or "forward" in vars(module) or _own_state(module):
        return "custom"
    return kind


def _own_state(module: nn.Module) -> set[str]:
    children = set(module._modules) - (_FUSED if _is_fused(module) else set())
    return (set(module._parameters) | set(module._buffers)) - set(STATE) | children


def _is_fused(module: nn.Module) -> bool:
    return type(module).forward.__module__ == "timm.layers.norm_act"


def _site(module: nn.Module, path: str, aliases: tuple[str, ...], tied: tuple[str, ...]) -> NormSite:
    kind = _kind(module)
    assert kind is not None
    name = type(module).__name__
    detail = None
    if kind == "custom":
        own = _own_state(module)
        what = f"state of its own ({', '.join(sorted(own))})" if own else "a forward method of its own"
        detail = f"{name} has {what}, whose meaning is not known"
    mean = getattr(module, "running_mean", None)
    variance, eps = getattr(module, "running_var", None), float(getattr(module, "eps", 1e-5))
    unknown = kind in ("lazy", "scripted")
    if detail is None and not unknown:
        detail = broken_statistics(mean, variance, eps)
    activation = module._modules.get("act") if kind != "scripted" and _is_fused(module) else None
    return NormSite(
        path=path,
        kind=kind,
        layer="torch.nn.functional.batch_norm"
        if kind == "functional"
        else f"{type(module).__module__}.{name}",
        channels=None if unknown else _channels(module),
        eps=eps,
        momentum=getattr(module, "momentum", 0.1) if kind != "frozen" else 0.0,
        affine=any(getattr(module, key, None) is not None for key in ("weight", "bias")),
        bias=getattr(module, "bias", None) is not None,
        track_running_stats=mean is not None,
        trained=False
        if kind == "lazy"
        else None
        if unknown
        else is_trained({name: getattr(module, name, None) for name in STATE}),
        ranks=_ranks(module),
        aliases=aliases,
        tied=tied,
        activation=None if activation is None else type(activation).__name__,
        followed_by=None if activation is None else activation_inside(module, path),
        detail=detail,
    )


def is_trained(state: Mapping[str, Tensor | None]) -> bool | None:
    """Tell whether a layer with running statistics was ever trained; None on the meta device.

    A counter at 0 is no proof: some trained networks have momentum 0 or were written without one. Nor are
    statistics at 0 and 1, beside a γ and β that were learned; a γ that starts at 0 everywhere was not.

    Args:
        state: its parameters and buffers by BatchNorm's names; what it lacks is None or left out.

    """
    weight, bias, mean, variance, batches = (state.get(name) for name in STATE)
    if mean is None or variance is None:
        return False
    present = [tensor for tensor in (weight, bias, mean, variance) if tensor is not None]
    if any(tensor.is_meta for tensor in present):
        return None
    if batches is not None and int(batches) > 0:
        return True
    if (mean != 0).any() or (variance != 1).any() or (bias is not None and (bias != 0).any()):
        return True
    return weight is not None and not bool((weight == 1).all() or (weight == 0).all())


def broken_statistics(mean: Tensor | None, variance: Tensor | None, eps: float) -> str | None:
    """Say what is wrong with running statistics by which no input can be normalized; None if nothing is."""
    for name, tensor in (("mean", mean), ("variance", variance)):
        if tensor is None or tensor.is_meta:
            continue
        numbers = tensor.detach().double()
        bad = ~numbers.isfinite()
        rule = "not finite"
        if name == "variance" and not bad.any():
            bad, rule = numbers + eps <= 0, f"not above -eps = {-eps:g}"
        if bad.any():
            channel = int(bad.nonzero()[0])
            return (
                f"its running {name} is {rule} in {int(bad.sum())} of {len(bad)} channels "
                f"({float(numbers[channel]):g} in channel {channel})"
            )
    return None


def _channels(module: nn.Module) -> int | None:
    for name in ("running_mean", "weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            return int(tensor.shape[0])
    count = getattr(module, "num_features", None)
    return None if count is None else int(count)


def _ranks(module: nn.Module) -> tuple[int, ...]:
    for layer, ranks in _RANKS.items():
        if isinstance(module, layer) and type(module)._check_input_dim is layer._check_input_dim:
            return ranks
    return (4,) if "Frozen" in type(module).__name__ else _ANY_RANK


def _with_observation(site: NormSite, observation: Observation) -> NormSite:
    shapes = tuple(dict.fromkeys(observation.shapes.get(site.path, ())))
    return replace(site, input_shapes=shapes, calls=len(observation.shapes.get(site.path, ())))


def _with_readings(
    model: nn.Module, sites: list[NormSite], modules: Mapping[str, nn.Module]
) -> list[NormSite]:
    read = defaultdict(set)
    for reading in readings(model, {id(module): module for module in modules.values()}):
        if reading.in_forward:
            read[reading.layer].add(reading.number)
    return [replace(site, read=tuple(sorted(read[id(modules[site.path])]))) for site in sites]


def _left_site(left: Left) -> NormSite:
    return NormSite(
        path=left.path,
        kind="functional",
        layer=left.operator,
        channels=left.shape[1] if len(left.shape) > 1 else None,
        eps=left.eps,
        momentum=None,
        affine=False,
        track_running_stats=False,
        trained=None,
        ranks=_ANY_RANK,
        input_shapes=(left.shape,),
        calls=1,
        detail=f"the program calls {left.operator} {left.why}",
    )


def _functional_site(call: FunctionalCall) -> NormSite:
    return NormSite(
        path=call.path,
        kind="functional",
        layer=_FUNCTION,
        channels=call.shape[1] if call.shape else None,
        eps=call.eps,
        momentum=None,
        affine=False,
        track_running_stats=False,
        trained=None,
        ranks=_ANY_RANK,
        input_shapes=(call.shape,) if call.shape else (),
        calls=call.calls,
        detail=f"{call.where}: {call.why}",
    )
