"""What in a model's own code a conversion would break, found before it does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from normsearch.errors import ModelError
from normsearch.operators import BATCH_NORMS
from normsearch.readings import readings
from normsearch.sites import NormSite


def refused_wrappers(model: nn.Module) -> None:
    """Raise a ``ModelError`` for models whose modules cannot be replaced."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled TorchScript, whose modules cannot be replaced; "
            "convert the nn.Module it was made from, then export the result, or torch.jit.trace it"
        )
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                raise ModelError(
                    f"{path or 'the model'} is wrapped in DistributedDataParallel, which holds on to the "
                    "parameters it was made with; convert model.module and wrap the result"
                )


def refused_operators(model: nn.Module) -> None:
    """Raise a ``ModelError`` for a graph whose batch norms are operators on tensors, which are no layers."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    found = next((node for node in nodes if node.target in BATCH_NORMS), None)
    if found is not None:
        raise ModelError(
            f"{type(model).__name__} calls {found.target}, as the module() of an exported program does; give "
            "the torch.export.ExportedProgram itself"
        )


def model_notes(
    model: nn.Module, changed: Sequence[NormSite], renumbered: Sequence[NormSite]
) -> tuple[str, ...]:
    """Name layers that a conversion cannot reach, and methods that read what it replaces.

    RepVGG, RepViT, LeViT, FastViT and their like fuse BatchNorm into convolutions in such methods, which
    fail afterwards; a forward that reads a site's γ or β gets other numbers, or fails.

    Args:
        model: what is to be converted.
        changed: sites that get another layer.
        renumbered: those of them whose γ and β are others then, or are elsewhere.

    """
    hidden = _hidden_notes(model)
    if not changed:
        return hidden
    return (
        *hidden,
        *_method_notes(model, changed),
        *_statistics_notes(model, changed),
        *_affine_notes(model, renumbered),
    )


def _hidden_notes(model: nn.Module) -> tuple[str, ...]:
    """Name BatchNorm layers in plain lists and the like, which are no submodules."""
    known = {id(module) for module in model.modules()}
    notes = []
    for path, owner in model.named_modules():
        for name, value in vars(owner).items():
            if name in _REGISTRIES:
                continue
            hidden = {
                id(layer): layer
                for held in _things(value)
                if isinstance(held, nn.Module)
                for layer in held.modules()
                if isinstance(layer, _BatchNorm) and id(layer) not in known
            }
            if hidden:
                where = f"{path}.{name}" if path else name
                notes.append(
                    f"{where} ({type(value).__name__}) hides {len(hidden)} BatchNorm layers: they are no "
                    "submodules and stay as they are; make it an nn.ModuleList or nn.ModuleDict"
                )
    return tuple(notes)


#: What most attributes are, and what holds nothing.
_PLAIN = (int, float, str, type(None), torch.Tensor)


def _things(value: Any) -> list[Any]:
    """Return everything that an attribute holds, but for plain values where it takes no time to see them."""
    if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)):
        return []
    return list(tree_leaves(value))


def _method_notes(model: nn.Module, changed: Sequence[NormSite]) -> tuple[str, ...]:
    """Name attributes that are a method of a layer, as ``self.norm = self.bn.forward`` leaves behind."""
    layers = {id(model.get_submodule(site.path)): site.path for site in changed if site.kind != "functional"}
    return tuple(
        f"{f'{path}.{name}' if path else name} is the method {value.__name__} of "
        f"{layers[id(value.__self__)]}, which stays that of the old layer after conversion; call the "
        "layer itself"
        for path, owner in model.named_modules()
        for name, held in vars(owner).items()
        if name not in _REGISTRIES
        for value in _things(held)
        if isinstance(value, MethodType) and id(value.__self__) in layers and value.__self__ is not owner
    )


#: Torch's own modules; those of quantization (torch.ao) read statistics of a layer of theirs.
_TORCH = ("torch.nn.", "torch.fx.")

#: Where a module keeps what it registered, and hooks.
_REGISTRIES = frozenset(vars(nn.Module()))


def _statistics_notes(model: nn.Module, changed: Sequence[NormSite]) -> tuple[str, ...]:
    inside = {
        id(m)
        for site in changed
        if site.kind in ("batch", "sync", "frozen", "lazy")
        for m in model.get_submodule(site.path).modules()
    }
    notes = {}
    for module in model.modules():
        cls = type(module)
        if id(module) in inside or cls.__module__.startswith(_TORCH) or cls in notes:
            continue
        readers = [name for name, function in _functions(cls) if _reads_statistics(function)]
        notes[cls] = sorted(set(readers))
    return tuple(
        f"{cls.__name__}.{name} reads running statistics and will fail or mislead after conversion; "
        "call it before converting"
        for cls, readers in notes.items()
        for name in readers
    )


def _affine_notes(model: nn.Module, renumbered: Sequence[NormSite]) -> tuple[str, ...]:
    layers = {
        id(layer): layer
        for site in renumbered
        if site.kind in ("batch", "sync", "frozen", "lazy")
        for layer in (model.get_submodule(site.path),)
    }
    found = readings(model, layers)
    # Who reads statistics too has a note already; what prepares a new network has run before a conversion.
    noted = {reading.method for reading in found if reading.number.startswith("running")}
    notes = [
        f"{reading.method} reads {'.'.join(reading.chain)}, which holds other numbers, or is missing, "
        "after conversion"
        for reading in found
        if reading.method not in noted and not re.search("init|reset", reading.method.rpartition(".")[2])
    ]
    return tuple(dict.fromkeys(notes))


def _functions(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    for base in cls.__mro__:
        if not base.__module__.startswith(_TORCH):
            for name, member in vars(base).items():
                function = getattr(member, "__func__", member)
                if isinstance(function, FunctionType):
                    yield name, function


def _reads_statistics(function: FunctionType) -> bool:
    return bool({"running_mean", "running_var"} & set(function.__code__.co_names))
