"""Converted programs: how one was converted, and its layers as modules again."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from normsearch.closing import record_in
from normsearch.conversion import PLAN, convert
from normsearch.errors import ModelError
from normsearch.opening import opened, opening_of
from normsearch.plans import Plan


def plan_in(program: ExportedProgram) -> Plan | None:
    """Return the plan that a program was converted with; None if it does not say.

    Raises:
        PlanError: what it says is no plan.
        MethodError: a method in it is not known.

    """
    record = record_in(program)
    text = None if record is None else record.get(PLAN)
    return Plan.from_json(text) if isinstance(text, str) else None


def with_layers(converted: ExportedProgram, original: ExportedProgram) -> fx.GraphModule:
    """Return a converted program as a module whose new layers are modules too.

    The original is converted once more as the converted one says, and takes over its numbers.

    Raises:
        ModelError: the converted program does not say how it was converted, or not from this original.
        PlanError: what it says is no plan, or does not fit the original.

    """
    plan = plan_in(converted)
    if plan is None:
        raise ModelError(
            "the converted program does not say how it was converted; give what normsearch.convert returned "
            "or normsearch.load read"
        )
    module = convert(opened(original), plan, in_place=True)
    assert isinstance(module, fx.GraphModule)
    opening = opening_of(module)
    assert opening is not None
    state: dict[str, Tensor] = {
        name: value
        for name, value in (*converted.state_dict.items(), *converted.constants.items())
        if isinstance(value, Tensor)
    }
    own = _tensors(module)
    for full, tensor in state.items():
        name = opening.places.get(full, full)
        if name not in own and name.endswith(".bias"):
            # Calibration gave the layer before a site a bias.
            layer = _layer(module, name.removesuffix(".bias"))
            if layer is not None and layer._parameters.get("bias", tensor) is None:
                layer.register_parameter("bias", nn.Parameter(torch.empty_like(tensor)))
                own = _tensors(module)
        there = own.get(name)
        if there is None or there.shape != tensor.shape:
            raise ModelError(
                f"the converted program has {full} of shape {tuple(tensor.shape)}, which the original, "
                "converted in the same way, has not; give a program and what convert made of it"
            )
        with torch.no_grad():
            there.copy_(tensor)
    return module


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
