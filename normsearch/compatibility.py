"""What in a model's own code a conversion would break, found before it does."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import FunctionType

import torch
from torch import nn

from normsearch.errors import ModelError
from normsearch.sites import NormSite


def refused_wrappers(model: nn.Module) -> None:
    """Raise a ``ModelError`` for models whose modules cannot be replaced."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is compiled TorchScript, whose modules cannot be replaced; "
            "convert the nn.Module it was made from, then script the result"
        )
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                raise ModelError(
                    f"{path or 'the model'} is wrapped in DistributedDataParallel, which holds on to the "
                    "parameters it was made with; convert model.module and wrap the result"
                )


def model_notes(model: nn.Module, changed: Sequence[NormSite]) -> tuple[str, ...]:
    """Name the methods of the model's classes that read what a conversion replaces.

    RepVGG, RepViT, LeViT, FastViT and their like fuse BatchNorm into convolutions in such methods, which
    fail afterwards; a forward that reads a site's γ or β gets other numbers, or fails.
    """
    if not changed:
        return ()
    return (*_statistics_notes(model, changed), *_affine_notes(model, changed))


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
        if id(module) in inside or cls.__module__.startswith("torch.") or cls in notes:
            continue
        readers = [name for name, function in _functions(cls) if _reads_statistics(function)]
        notes[cls] = sorted(set(readers))
    return tuple(
        f"{cls.__name__}.{name} reads running statistics and will fail or mislead after conversion; "
        "call it before converting"
        for cls, readers in notes.items()
        for name in readers
    )


def _affine_notes(model: nn.Module, changed: Sequence[NormSite]) -> tuple[str, ...]:
    owners: dict[type[nn.Module], set[str]] = {}
    for site in changed:
        if site.kind in ("batch", "sync", "frozen", "lazy"):
            for path in (site.path, *site.aliases):
                owner, _, name = path.rpartition(".")
                owners.setdefault(type(model.get_submodule(owner)), set()).add(name)
    return tuple(
        f"{cls.__name__}.{name} reads {child}.{attribute}, which holds other numbers, or is missing, "
        "after conversion"
        for cls, children in owners.items()
        for name, function in _functions(cls)
        # What prepares a new network has run before a conversion.
        if "init" not in name and "reset" not in name and not _reads_statistics(function)
        for child, attribute in sorted(_attributes_of(function, children))
    )


def _functions(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    for base in cls.__mro__:
        if not base.__module__.startswith("torch."):
            for name, member in vars(base).items():
                function = getattr(member, "__func__", member)
                if isinstance(function, FunctionType):
                    yield name, function


def _reads_statistics(function: FunctionType) -> bool:
    return bool({"running_mean", "running_var"} & set(function.__code__.co_names))


def _attributes_of(function: FunctionType, children: set[str]) -> set[tuple[str, str]]:
    """Return the (child, attribute) pairs that the code reads as ``self.child.weight`` or ``.bias``."""
    loads = [(i.opname == "LOAD_ATTR", i.argval) for i in dis.get_instructions(function)]
    return {
        (first, second)
        for (one, first), (two, second) in pairwise(loads)
        if one and two and first in children and second in ("weight", "bias")
    }
