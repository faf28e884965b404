"""Resident: one model in memory that becomes one converted model after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normsearch.forward import copied, preserved, restored_modes
from normsearch.plans import Plan
from normsearch.sites import with_calls_lifted
from normsearch.surgery import HOOKS, replace_layers

_COPIES = "plans are tried on a copy: give a model that copy.deepcopy can copy"


@dataclass(frozen=True)
class _Kept:
    """What a parameter or buffer was."""

    tensor: Tensor | None
    value: Tensor | None
    requires_grad: bool


class Resident:
    """A copy of a trained model that is converted in place, trained, and put back.

    ``converted(plan)`` gives what ``convert(model, plan)`` would, without another copy of the network:
    layers are swapped in place; afterwards structure, weights, statistics, gradients, modes and hooks are
    those of the snapshot again, whatever was done to the model in between.

    Args:
        model: the trained model; it is copied once and left alone.

    Raises:
        ModelError: the model cannot be copied.

    Example:
        >>> import torch, normsearch
        >>> from normsearch.searching import Resident
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        >>> resident = Resident(model)
        >>> with resident.converted(normsearch.plan(model, "group")) as converted:
        ...     print(type(converted[1]).__name__)
        GroupNorm

    """

    def __init__(self, model: nn.Module) -> None:
        # F.batch_norm calls become layers once, for all plans.
        self._model = with_calls_lifted(copied(model, way_out=_COPIES))
        self._modules = list(self._model.modules())
        self._tensors: list[tuple[dict[str, Any], str, _Kept]] = []
        for module in self._modules:
            for group in (module._parameters, module._buffers):
                self._tensors += [(group, name, _kept(tensor)) for name, tensor in group.items()]
        self._names = [(set(module._parameters), set(module._buffers)) for module in self._modules]

    @property
    def model(self) -> nn.Module:
        """The network as it was given; not to be edited."""
        return self._model

    @contextmanager
    def converted(self, plan: Plan) -> Iterator[nn.Module]:
        """Give the model converted by a plan; when the block ends, it is put back.

        Raises:
            ModelError: a layer cannot be built.

        """
        with self.borrowed() as model:
            yield replace_layers(model, plan, "function")

    @contextmanager
    def borrowed(self) -> Iterator[nn.Module]:
        """Give the model itself, to do anything with; when the block ends, it is put back."""
        children = [(module, dict(module._modules)) for module in self._modules]
        hooks = [
            (vars(module)[name], vars(module)[name].copy()) for module in self._modules for name in _DICTS
        ]
        with preserved(self._model), restored_modes(self._model):
            try:
                yield self._model
            finally:
                for module, kept in children:
                    module._modules.clear()
                    module._modules.update(kept)
                for hung, before in hooks:
                    hung.clear()
                    hung.update(before)
                self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for module, (parameters, buffers) in zip(self._modules, self._names, strict=True):
            for group, names in ((module._parameters, parameters), (module._buffers, buffers)):
                for added in set(group) - names:
                    del group[added]
        for group, name, kept in self._tensors:
            tensor = kept.tensor
            group[name] = tensor  # type: ignore[assignment]
            if tensor is None or kept.value is None:
                continue
            now, was = tensor, kept.value
            if (now.dtype, now.device, now.shape) == (was.dtype, was.device, was.shape):
                tensor.copy_(was)
            else:
                # The objective moved the model elsewhere, or to another type.
                tensor.data = was.clone()
            tensor.grad = None
            tensor.requires_grad_(kept.requires_grad)


def _kept(tensor: Tensor | None) -> _Kept:
    if tensor is None:
        return _Kept(None, None, False)
    return _Kept(tensor, tensor.detach().clone(), tensor.requires_grad)


_DICTS = [name for name in HOOKS if name != "_is_full_backward_hook"]
