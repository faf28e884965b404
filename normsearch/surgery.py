"""The surgeon for modules: builds what a plan asks for, then puts it wherever the old layers were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.forward import TORCH_ATTRIBUTES
from normsearch.methods import Built, Keep, Method, TrainedNorm
from normsearch.optimizers import check_optimizer, parameter_names, rename_parameters, replace_parameters
from normsearch.plans import Plan
from normsearch.reparametrization import Reparametrized
from normsearch.sites import NormSite

#: Everything of a module's that a user may have hung on it; the dicts move, so that handles stay valid.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def in_order(plan: Plan) -> list[tuple[NormSite, Method]]:
    """Return a plan's changes, those that fold into a producer first.

    A producer may also be the nearest weight upstream of another site, which only normalizes it.
    """
    return sorted(plan.changes, key=lambda change: not _folds(*change))


def _folds(site: NormSite, method: Method) -> bool:
    return method.rewrites_producer(site) and site.producer is not None and site.producer.foldable


def replace_layers(
    model: nn.Module,
    plan: Plan,
    keep: Keep,
    *,
    inputs: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Carry out a plan on the model itself; return it, or its successor if it is itself a site."""
    if optimizer is not None:
        check_optimizer(optimizer, model)
    # Everything is built before anything is replaced: a failure leaves the model whole.
    new: dict[int, tuple[nn.Module, nn.Module]] = {}
    untrained: dict[Method, list[tuple[TrainedNorm, Built]]] = defaultdict(list)
    for site, method in in_order(plan):
        old = model.get_submodule(site.path)
        trained = TrainedNorm.of(old, site) if site.kind != "weight" else TrainedNorm.absent(site)
        built = method.build(site, trained.reset(keep), _producer(site, method, model, new))
        absorbs = method.absorbs(site)
        new[id(old)] = (old, built.module)
        if site.kind != "weight":
            new[id(old)] = (old, dressed := _dressed(site, old, built.module, absorbs))
            _move_hooks(old, dressed)
        if absorbs and site.followed_by is not None and not site.followed_by.inside:
            act = model.get_submodule(site.followed_by.path)
            new[id(act)] = (act, nn.Identity().train(act.training))
        if built.producer is not None and site.producer is not None:
            source = model.get_submodule(site.producer.path)
            new[id(source)] = (source, built.producer)
        if site.trained is False and keep == "function":
            untrained[method].append((trained, built))
    _put(model, new, optimizer)
    changed = new[id(model)][1] if id(model) in new else model
    if inputs is not None:
        for method, layers in untrained.items():
            method.initialise(changed, layers, inputs)
    return changed


def candidate(model: nn.Module, site: NormSite, method: Method) -> list[tuple[nn.Module, nn.Module]]:
    """Build what a method would put at one BatchNorm site, for a look: old and new layers, nothing replaced.

    The new layers stand alone: they share neither γ and β nor the site's hooks with the model.
    """
    old = model.get_submodule(site.path)
    trained = TrainedNorm.of(old, site)
    # A method may decide what of γ and β is trained, which must not show in the model.
    own = replace(trained, weight=_apart(trained.weight), bias=_apart(trained.bias))
    built = method.build(site, own, _producer(site, method, model, {}))
    absorbs = method.absorbs(site)
    pairs = [(old, _dressed(site, old, built.module, absorbs))]
    if absorbs and site.followed_by is not None and not site.followed_by.inside:
        pairs.append((model.get_submodule(site.followed_by.path), nn.Identity()))
    if built.producer is not None and site.producer is not None:
        pairs.append((model.get_submodule(site.producer.path), built.producer))
    return pairs


def _apart(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _producer(
    site: NormSite, method: Method, model: nn.Module, new: Mapping[int, tuple[nn.Module, nn.Module]]
) -> nn.Module | None:
    if not method.rewrites_producer(site) or site.producer is None or not site.producer.plain:
        return None
    layer = model.get_submodule(site.producer.path)
    if id(layer) in new:
        layer = new[id(layer)][1]
    return None if isinstance(layer, Reparametrized) else layer


def _dressed(site: NormSite, old: nn.Module, new: nn.Module, absorbs: bool) -> nn.Module:
    """Give a new layer the old one's training flag, ranks and what it carried inside.

    ``absorbs`` says that the new layer takes the place of the activation inside too.
    """
    new.train(old.training)
    if type(new).__module__.startswith("normsearch.methods."):
        # What BatchNorm2d refuses, its successor must not read as (N, C, L).
        vars(new)["ranks"] = site.ranks
    if site.activation is not None:
        # timm's fused layers: norm, then drop, then act; the names keep their state dict entries in place.
        fused = nn.Sequential()
        fused.add_module("norm", new)
        inside = site.followed_by is not None and site.followed_by.inside
        for name in ("drop",) if absorbs and inside else ("drop", "act"):
            if name in old._modules:
                fused.add_module(name, old._modules[name])
        fused.training = old.training
        return fused
    return new


def _put(
    model: nn.Module,
    new: Mapping[int, tuple[nn.Module, nn.Module]],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    names = {} if optimizer is None else parameter_names(optimizer)
    if optimizer is not None:
        replace_parameters(optimizer, list(new.values()))
    put(model, {key: layer for key, (_, layer) in new.items()})
    if optimizer is not None:
        rename_parameters(optimizer, model, names)


def put(model: nn.Module, replacement: Mapping[int, nn.Module]) -> None:
    """Put modules, by the id of their predecessor, wherever a model refers to that one."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in replacement:
                module._modules[name] = replacement[id(child)]
        for name, value in vars(module).items():
            if isinstance(value, nn.Module | list | tuple | dict) and name not in TORCH_ATTRIBUTES:
                vars(module)[name] = _in_container(value, replacement)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    own = dict(new._forward_pre_hooks)
    for name in HOOKS:
        vars(new)[name] = vars(old)[name]
    for hook in own.values():
        new.register_forward_pre_hook(hook)


def _in_container(value: Any, replacement: Mapping[int, nn.Module]) -> Any:
    """Replace modules that a plain list, tuple or dict attribute refers to beside their registered names."""
    if isinstance(value, nn.Module):
        return replacement.get(id(value), value)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _in_container(item, replacement)
    elif isinstance(value, list):
        value[:] = [_in_container(item, replacement) for item in value]
    elif type(value) is tuple:
        items = tuple(_in_container(item, replacement) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value
