"""An optimizer that follows its model's layers when they are replaced in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normsearch.errors import PlanError


def replace_parameters(
    optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[nn.Module, nn.Module]]
) -> None:
    """Put the parameters of new layers where those of the old ones stood.

    A parameter that lives on keeps its optimizer state; a replaced one's successor starts afresh, in the
    same group and position. Parameters that a method adds join the group of their layer's weight, or the
    first group where the old layer had none. Nothing is added for a layer that the optimizer did not train.

    Args:
        optimizer: of the model that the layers are in.
        pairs: old and new layers.

    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for old, new in pairs:
        before = {name: parameter for name, parameter in old._parameters.items() if parameter is not None}
        norm = new.get_submodule("norm") if isinstance(new, nn.Sequential) else new
        after = dict(norm.named_parameters(recurse=False))
        home = next((groups[id(p)] for p in before.values() if id(p) in groups), None)
        if home is None and before:
            continue
        home = home or optimizer.param_groups[0]
        living = {id(parameter) for parameter in after.values()}
        held = {id(parameter) for parameter in before.values()}
        after = {name: parameter for name, parameter in after.items() if id(parameter) not in held}
        for name, parameter in before.items():
            if id(parameter) in living or id(parameter) not in groups:
                continue
            optimizer.state.pop(parameter, None)
            members = groups[id(parameter)]["params"]
            position = next(i for i, member in enumerate(members) if member is parameter)
            successor = after.pop(name, None)
            members[position : position + 1] = [] if successor is None else [successor]
        home["params"].extend(after.values())


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise a ``PlanError`` if the optimizer holds no parameter of the model."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise PlanError("the optimizer holds no parameter of this model; give the one made for it")


def parameter_names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The names that an optimizer made from ``named_parameters()`` knows its parameters by."""
    return {
        id(parameter): name
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def rename_parameters(optimizer: torch.optim.Optimizer, model: nn.Module, names: dict[int, str]) -> None:
    """Bring ``param_names`` back into step with ``params`` after layers were replaced."""
    names = {**names, **{id(parameter): name for name, parameter in model.named_parameters()}}
    for group in optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
