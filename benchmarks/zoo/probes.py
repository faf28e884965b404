"""What is counted without asking normsearch: BatchNorm layers and calls, dead layers, outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

#: Where an input varies by this much, relative to its size, a living layer's output does too.
_VARIES, _CONSTANT = 1e-3, 1e-5
#: Samples whose outputs differ by less than this, relative to their size, are treated alike.
_ALIKE = 1e-9


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers by path, told by base class and by name; normsearch's own are none."""
    return {
        path: module
        for path, module in model.named_modules()
        if ("BatchNorm" in type(module).__name__ or isinstance(module, _BatchNorm)) and not _ours(module)
    }


def _ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("normsearch.methods.")


class _Calls(TorchFunctionMode):
    """Collect the modules that call F.batch_norm on activations."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[nn.Module] = []
        self.running: list[nn.Module] = []

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Note that the innermost module is done."""
        self.running.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (F.batch_norm, torch.batch_norm):
            caller = self.running[-1]
            # Convolutions standardize their weight with it.
            if not _ours(caller) and not isinstance(caller, _ConvNd | _InstanceNorm):
                self.callers.append(caller)
        return func(*args, **(kwargs or {}))


@contextmanager
def batch_norm_calls() -> Iterator[list[nn.Module]]:
    """Yield the modules that call F.batch_norm on activations while the context lasts."""
    mode = _Calls()
    with ExitStack() as stack:
        enter = register_module_forward_pre_hook(lambda module, _args: mode.running.append(module))
        stack.callback(enter.remove)
        leave = register_module_forward_hook(mode.leave, always_call=True)
        stack.callback(leave.remove)
        stack.enter_context(mode)
        yield mode.callers


@contextmanager
def dead_layers(layers: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield the paths of layers whose output is constant where their input is not, as they run.

    By their shape, since one element to normalize over leaves β, and where there are numbers by these too.
    """
    dead: list[str] = []

    def look(path: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        constant = _elements(layer, x) == 1
        if not x.is_meta and not constant:
            constant = variation(x) > _VARIES and not variation(y) > _CONSTANT
        if constant and path not in dead:
            dead.append(path)

    with ExitStack() as stack:
        for path, layer in layers.items():
            hook = layer.register_forward_hook(
                lambda layer, args, output, path=path: look(path, layer, args[0], output)
            )
            stack.callback(hook.remove)
        yield dead


def variation(x: Tensor) -> float:
    """Return how much the channel that varies most does so over samples and positions, relative to all."""
    rows = x.detach().movedim(1, -1).flatten(0, -2)
    return float(rows.std(0).max() / rows.abs().max())


def _elements(layer: nn.Module, x: Tensor) -> int | None:
    """Return over how many elements a layer normalizes; None if that is not over a sample's."""
    spatial = math.prod(x.shape[2:])
    if isinstance(layer, nn.GroupNorm):
        return spatial * x.shape[1] // layer.num_groups
    return spatial if isinstance(layer, _InstanceNorm) else None


def norm_at(model: nn.Module, path: str) -> nn.Module:
    """Return what normalizes there now: a norm + act module becomes norm, drop and act."""
    module = model.get_submodule(path)
    return module.get_submodule("norm") if "norm" in module._modules and path else module


def tensors(output: Any) -> list[Tensor]:
    """Return every floating point tensor in an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖ over all numbers; infinite if the shapes differ."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return math.inf
    a, b = (torch.cat([x.detach().double().flatten() for x in part]) for part in (found, wanted))
    return float((a - b).norm() / b.norm()) if not torch.equal(a, b) else 0.0


def tells_samples_apart(output: list[Tensor]) -> bool:
    """Tell whether the outputs of the two samples of a batch differ."""
    moved = sum(float((x[0] - x[1]).square().sum()) for x in output if x.ndim and x.shape[0] == 2)
    size = sum(float(x.square().sum()) for x in output if x.ndim and x.shape[0] == 2)
    return moved > _ALIKE**2 * size
