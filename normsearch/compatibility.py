"""What in a model's own code a conversion would break, found before it does."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Name the methods of the model's classes that read running statistics and will fail afterwards.

    RepVGG, RepViT, LeViT, FastViT and their like fuse BatchNorm into convolutions in such methods.
    """
    if not changed:
        return ()
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
        readers = [
            name
            for base in cls.__mro__
            if not base.__module__.startswith("torch.")
            for name, member in vars(base).items()
            if isinstance(function := getattr(member, "__func__", member), FunctionType)
            and {"running_mean", "running_var"} & set(function.__code__.co_names)
        ]
        notes[cls] = sorted(set(readers))
    return tuple(
        f"{cls.__name__}.{name} reads running statistics and will fail or mislead after conversion; "
        "call it before converting"
        for cls, readers in notes.items()
        for name in readers
    )
