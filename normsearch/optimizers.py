"""An optimizer that follows its model's layers when they are replaced in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normsearch.errors import PlanError


def replace_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module, pairs: Sequence[tuple[nn.Module, nn.Module]]
) -> None:
    """Put the parameters of new layers where those of the old ones stood.

    A parameter that lives on keeps its optimizer state; a replaced one's successor starts afresh, in the
    same group and position. Parameters that a method adds join the group of their layer's weight, or the
    first group where the old layer had none. Nothing is added for a layer that the optimizer did not train.

    Args:
        optimizer: made for ``model``.
        model: before its layers are replaced.
        pairs: old and new layers.

    Raises:
        PlanError: the optimizer holds no parameter of the model.

    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in groups for parameter in model.parameters()):
        raise PlanError("the optimizer holds no parameter of this model; give the one made for it")
    for old, new in pairs:
        before = {name: parameter for name, parameter in old._parameters.items() if parameter is not None}
        norm = new.get_submodule("norm") if isinstance(new, nn.Sequential) else new
        after = dict(norm.named_parameters(recurse=False))
        home = next((groups[id(p)] for p in before.values() if id(p) in groups), None)
        if home is None and before:
            continue
        home = home or optimizer.param_groups[0]
        for name, parameter in before.items():
            if after.get(name) is parameter or id(parameter) not in groups:
                after.pop(name, None)
                continue
            optimizer.state.pop(parameter, None)
            members = groups[id(parameter)]["params"]
            position = next(i for i, member in enumerate(members) if member is parameter)
            successor = after.pop(name, None)
            members[position : position + 1] = [] if successor is None else [successor]
        home["params"].extend(after.values())
