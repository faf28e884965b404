"""convert: replace a model's BatchNorm layers as modules, keeping everything else as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from normsearch.compatibility import refused_wrappers
from normsearch.errors import ModelError, PlanError, RefusedError, StateError
from normsearch.forward import evaluating, try_call
from normsearch.methods import Keep, Method, TrainedNorm
from normsearch.optimizers import replace_parameters
from normsearch.plans import Plan, To, Where, plan, refusal_at
from normsearch.sites import NormSite, analyse

#: Everything of a module's that a user may have hung on it; the dicts move, so that handles stay valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def convert(
    model: nn.Module,
    to: To | Plan,
    *,
    inputs: Any = None,
    where: Where | None = None,
    keep: Keep = "function",
    in_place: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Replace BatchNorm layers by other normalizations and keep what the network has learned.

    Each new layer is initialised from the trained one: exactly where the method allows it, else by folding
    the running statistics into its affine (see ``Method.exact``). Class, methods, names and hooks of the
    model stay, as do eps, device, dtype, training flags, requires_grad and sharing.

    Args:
        model: any nn.Module; it is left untouched unless ``in_place``.
        to: a ``Plan``, or what ``plan`` takes.
        inputs: one forward pass's inputs, as for ``plan``; lazy layers need them.
        where: as for ``plan``.
        keep: ``function`` carries statistics, γ and β; ``affine`` γ and β only; ``nothing`` resets the
            layer, as a plain swap does.
        in_place: edit the model itself instead of a copy.
        optimizer: with ``in_place``, an optimizer of the model: replaced parameters take their
            predecessors' places in its groups.

    Returns:
        The converted model.

    Raises:
        RefusedError: a method cannot stand at a site; nothing was changed.
        PlanError: a given plan does not fit the model, or the arguments contradict each other.
        ModelError: the model cannot be copied, edited or run.
        MethodError: a spelling is not valid.

    Example:
        >>> import torch, normsearch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> type(normsearch.convert(model, "group")[1])
        <class 'torch.nn.modules.normalization.GroupNorm'>

    """
    if keep not in get_args(Keep):
        raise PlanError(f"keep={keep!r} is not one of {', '.join(get_args(Keep))}")
    if optimizer is not None and not in_place:
        raise PlanError("an optimizer belongs to the model it was made for; give it with in_place=True only")
    if isinstance(to, Plan) and where is not None:
        raise PlanError("a Plan says what happens at each site; give where= to plan() instead")
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load the model first")
    refused_wrappers(model)
    lazy = inputs is not None and any(_is_lazy(module) for module in model.modules())
    target = model
    if lazy:
        target = model if in_place else _copied(model)
        with evaluating(target):
            try_call(target, inputs)
    the_plan = _checked(to, target) if isinstance(to, Plan) else plan(target, to, inputs=inputs, where=where)
    if in_place and "" in {site.path for site, _ in the_plan.changes}:
        raise ModelError(
            f"the model itself is a {type(model).__name__}, which cannot be replaced in place; "
            "use the return value of convert without in_place"
        )
    if not in_place and not lazy:
        target = _copied(model)
    return _replace(target, the_plan, keep, optimizer)


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
    for site, method in plan.changes:
        prefixes = [f"{path}." if path else "" for path in (site.path, *site.aliases)]
        present = [prefix for prefix in prefixes if any(f"{prefix}{name}" in state_dict for name in _STATE)]
        if not present and (site.affine or site.track_running_stats):
            raise StateError(
                f"the state dict has no entry for {site.path}; give one saved from the model that the plan "
                "was made for (a wrapper's prefix such as module. must match too)"
            )
        for prefix in present or prefixes[:1]:
            new = method.build(site, TrainedNorm.from_state_dict(state_dict, prefix, site)).module
            for name in _STATE:
                result.pop(f"{prefix}{name}", None)
            inner = f"{prefix}norm." if site.activation is not None else prefix
            result.update({f"{inner}{name}": value.detach() for name, value in new.state_dict().items()})
    return result


_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "use in_place=True to edit the model itself"
        ) from error


def _checked(the_plan: Plan, model: nn.Module) -> Plan:
    """Return ``the_plan`` if it fits ``model``.

    Raises:
        PlanError: a site is missing or is another layer.
        RefusedError: a method cannot stand at a site.

    """
    found = {site.path: site for site in analyse(model, None, dataflow=False)}
    for site, _ in the_plan.changes:
        here = found.get(site.path)
        if here is None:
            raise PlanError(
                f"the plan changes {site.path!r}, where {type(model).__name__} has no BatchNorm layer; "
                "use a plan made for this model"
            )
        for name in ("layer", "channels", "eps"):
            planned, given = getattr(site, name), getattr(here, name)
            if planned != given:
                raise PlanError(
                    f"the plan expects {name} {planned} at {site.path!r}, the model has {given}; "
                    "use a plan made for this model"
                )
    refusals = [refusal_at(site, method) for site, method in the_plan.changes]
    if any(refusals):
        raise RefusedError(tuple(refusal for refusal in refusals if refusal is not None))
    return the_plan


def _replace(
    model: nn.Module, the_plan: Plan, keep: Keep, optimizer: torch.optim.Optimizer | None
) -> nn.Module:
    # Everything is built before anything is replaced: a failure leaves an in-place model whole.
    new = {}
    for site, method in the_plan.changes:
        old = model.get_submodule(site.path)
        new[id(old)] = (old, _built(site, method, old, keep))
    for old, built in new.values():
        _move_hooks(old, built)
    if optimizer is not None:
        replace_parameters(optimizer, model, [(old, built) for old, built in new.values()])
    replacement = {key: built for key, (_, built) in new.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in replacement:
                module._modules[name] = replacement[id(child)]
        for name, value in vars(module).items():
            if isinstance(value, list | tuple | dict) and not name.startswith("_"):
                vars(module)[name] = _in_container(value, replacement)
    return replacement.get(id(model), model)


def _built(site: NormSite, method: Method, old: nn.Module, keep: Keep) -> nn.Module:
    new = method.build(site, TrainedNorm.of(old, site).reset(keep)).module
    new.train(old.training)
    if site.activation is None:
        return new
    # timm's fused layers: norm, then drop, then act; the names keep their state dict entries in place.
    fused = nn.Sequential()
    fused.add_module("norm", new)
    for name in ("drop", "act"):
        if name in old._modules:
            fused.add_module(name, old._modules[name])
    fused.training = old.training
    return fused


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    own = dict(new._forward_pre_hooks)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
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
