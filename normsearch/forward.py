"""How a model is run: the input convention, evaluation mode and random state restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normsearch.errors import ModelError


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model``: a tuple is ``*args``, a dict ``**kwargs``, anything else (a list too) one argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the network inside a compiled or DataParallel wrapper and the path prefix it has there."""
    prefix = ""
    while True:
        for wrapper, name in ((nn.DataParallel, "module"), (torch._dynamo.OptimizedModule, "_orig_mod")):
            if isinstance(model, wrapper):
                model, prefix = getattr(model, name), f"{prefix}{name}."
                break
        else:
            return model, prefix


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own training flag, which ``model.train()`` would make uniform."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode without gradients; restore modes and the CPU's random state."""
    with restored_modes(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in model.modules():
            # GraphModules of torch.export forbid eval(); the flag itself is what layers read.
            module.training = False
        yield


def try_call(model: nn.Module, inputs: Any) -> Any:
    """Run ``call`` and turn a failure of the user's model into a ``ModelError`` that names it.

    Raises:
        ModelError: the forward pass failed; the original exception is the cause.

    """
    try:
        return call(model, inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} failed on the given inputs with {type(error).__name__}: {error}. "
            "A tuple is passed as *args, a dict as **kwargs, anything else as one argument; "
            "check that model(inputs) runs in eval mode"
        ) from error
