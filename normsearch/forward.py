"""How a model is run: the input convention, evaluation mode and random state restored afterwards."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import register_dataclass, tree_map

from normsearch.errors import ModelError

#: What torch keeps in every module's own dictionary; all else there is the user's.
TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))

#: What to do about several inputs that are no tuple.
LISTED = (
    "the inputs are a list, which is one argument, and several inputs are a tuple: give "
    "[(tuple(inputs), targets) for inputs, targets in loader], or the loader a collate_fn that makes tuples"
)


@dataclass(frozen=True)
class Arguments:
    """One forward pass's inputs where some are positional and some are named: ``model(*args, **kwargs)``.

    Attributes:
        args: the positional ones.
        kwargs: the named ones.

    Example:
        >>> import torch, normsearch
        >>> attention = torch.nn.MultiheadAttention(8, 2).eval()
        >>> x = torch.randn(4, 3, 8)
        >>> inputs = normsearch.Arguments((x, x, x), {"need_weights": False})
        >>> normsearch.profile(attention, inputs).parameters
        288

    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


#: Tensors in it are found, copied and cut into samples as those in tuples and dicts are.
register_dataclass(Arguments)


def arguments(inputs: Any) -> Arguments:
    """Return inputs as arguments: a tuple is ``*args``, a dict ``**kwargs``, anything else one argument."""
    if isinstance(inputs, Arguments):
        return inputs
    if isinstance(inputs, dict):
        return Arguments((), inputs)
    return Arguments(inputs if isinstance(inputs, tuple) else (inputs,))


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` on one forward pass's inputs."""
    given = arguments(inputs)
    return model(*given.args, **given.kwargs)


def open_batches(model: nn.Module, given: Arguments) -> Any:
    """Return ``dynamic_shapes`` of ``torch.export`` that leave the first size of every tensor open."""
    shapes = tree_map(_open_batch, given)
    if not (given.args and given.kwargs):
        return shapes.args or shapes.kwargs
    return dict(inspect.signature(model.forward).bind(*shapes.args, **shapes.kwargs).arguments)


def _open_batch(value: Any) -> Any:
    return {0: Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the network inside a compiled or DataParallel wrapper and the path prefix it has there."""
    prefix = ""
    wrappers: list[tuple[type[nn.Module], str]] = [(nn.DataParallel, "module")]
    # Naming the compiler imports it, for a second; nothing is compiled that was not imported.
    if "torch._dynamo" in sys.modules:
        wrappers.append((torch._dynamo.OptimizedModule, "_orig_mod"))
    while True:
        for wrapper, name in wrappers:
            if isinstance(model, wrapper):
                model, prefix = getattr(model, name), f"{prefix}{name}."
                break
        else:
            return model, prefix


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the network that torch.compile wrapped; anything else as it is."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model.get_submodule("_orig_mod")
    return model


def copied(model: nn.Module, *, way_out: str = "use in_place=True to edit the model itself") -> nn.Module:
    """Return a deep copy, of lazy models too.

    Args:
        model: what to copy.
        way_out: how the error ends.

    Raises:
        ModelError: the model cannot be copied.

    """
    # torch's UninitializedBuffer, unlike UninitializedParameter, cannot be copied: give deepcopy its copies.
    memo: dict[int, Any] = {
        id(buffer): type(buffer)(requires_grad=False, device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
        for module in model.modules()
        for buffer in module._buffers.values()
        if isinstance(buffer, nn.parameter.UninitializedBuffer)
    }
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); {way_out}"
        ) from error


def is_lazy(model: nn.Module) -> bool:
    """Whether any layer waits for a first forward pass."""
    return any(
        isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()
        for module in model.modules()
    )


def materialised(model: nn.Module, inputs: Any, *, in_place: bool = False) -> nn.Module:
    """Run one forward pass, which gives lazy layers their sizes, on a copy of the model.

    Raises:
        ModelError: the model cannot be copied, or fails on ``inputs``.

    """
    target = model if in_place else copied(model)
    with evaluating(target):
        try_call(target, inputs)
    return target


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
def preserved(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass writes into the modules' own attributes, such as LeViT's cache of biases.

    A trace would leave its proxies there, and the next copy or forward pass would stumble over them.
    """
    before = []
    for module in model.modules():
        attributes = {name: value for name, value in vars(module).items() if name not in TORCH_ATTRIBUTES}
        contents = [(v, copy.copy(v)) for v in attributes.values() if type(v) in (dict, list, set)]
        before.append((module, attributes, contents))
    try:
        yield
    finally:
        for module, attributes, contents in before:
            for name in set(vars(module)) - TORCH_ATTRIBUTES - set(attributes):
                del vars(module)[name]
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode without gradients; restore modes and the CPU's random state."""
    with restored_modes(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        for module in model.modules():
            # GraphModules of torch.export forbid eval(); the flag itself is what layers read.
            module.training = False
        yield


def refuse_meta(model: nn.Module, purpose: str) -> None:
    """Raise a ``ModelError`` for a model on the meta device, which has no numbers for the purpose."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type == "meta":
            raise ModelError(f"{name} is on the meta device: it has no numbers to {purpose}; load them first")


def try_call(model: nn.Module, inputs: Any) -> Any:
    """Run ``call`` and turn a failure of the user's model into a ``ModelError`` that names it.

    Raises:
        ModelError: the forward pass failed; the original exception is the cause.

    """
    try:
        return call(model, inputs)
    except ModelError:
        raise
    except Exception as error:
        if isinstance(inputs, list):
            said = str(error).partition("\n")[0].rstrip(":")
            raise ModelError(
                f"{type(model).__name__} failed on a list of {len(inputs)} as its one argument with "
                f"{type(error).__name__}: {said}. A batch is a tensor, a tuple for positional or a dict for "
                "keyword arguments; a DataLoader yields lists: give [batch[0] for batch in loader], or "
                "tuples of the inputs where there are several"
            ) from error
        raise ModelError(
            f"{type(model).__name__} failed on the given inputs with {type(error).__name__}: {error}. "
            "A tuple is passed as *args, a dict as **kwargs, both as normsearch.Arguments(args, kwargs), "
            "anything else as one argument; check that model(inputs) runs in eval mode"
        ) from error
