"""Layers whose weight is computed from other parameters: any convolution or linear class, still itself.

torch.nn.utils.parametrize changes a module's class in a way that pickle refuses. Here a layer becomes an
instance of a subclass of its own class, made once per (class, rule), that pickles, copies and loads.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


def out_channels(layer: nn.Module) -> int:
    """Return the number of output channels or features of a convolution or linear layer."""
    count = getattr(layer, "out_channels", None)
    return int(layer.out_features if count is None else count)  # type: ignore[arg-type]


def rows(weight: Tensor, layer: nn.Module) -> Tensor:
    """Return a layer's weight as a matrix with one row per output channel.

    A transposed convolution's weight is (in, out/groups, *kernel): its rows gather (in/groups, *kernel) of
    each group.
    """
    if not isinstance(layer, _ConvTransposeNd):
        return weight.flatten(1)
    groups = layer.groups
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(layer.out_channels, -1)


def per_output(vector: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a vector of one number per output channel in a shape that multiplies the layer's weight."""
    if not isinstance(layer, _ConvTransposeNd):
        return vector.reshape(-1, *(1 for _ in weight.shape[1:]))
    groups, kernel = layer.groups, (1 for _ in weight.shape[2:])
    # (G, out/G) to (in, out/G): every input channel of a group sees that group's outputs.
    spread = vector.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return spread.reshape(weight.shape[0], -1, *kernel)


def shallow_copy(layer: nn.Module, cls: type[Any] | None = None) -> Any:
    """Return a new module, of another class if given, with the layer's own parameters, buffers and hooks."""
    new: Any = object.__new__(cls or type(layer))
    vars(new).update(vars(layer))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(new)[name] = dict(vars(layer)[name])
    return new


class Reparametrized(nn.Module):
    """Mixed in before a layer's own class: ``weight`` is computed at each use from parameters of its own."""

    #: Prefix of the class names.
    prefix: ClassVar[str]

    @property
    def weight(self) -> Tensor:
        """The weight that the layer uses."""
        raise NotImplementedError

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """Return ``layer`` as an instance of the mixed class, without its weight; all else is shared."""
        new: Self = shallow_copy(layer, _mixed(cls, type(layer)))
        del new._parameters["weight"]
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the two classes, which can both be imported, and the state."""
        mixin, original = type(self).__bases__
        return _restore, (mixin, original), vars(self)


_MIXED: dict[tuple[type[Reparametrized], type[nn.Module]], type[Any]] = {}


def _mixed(mixin: type[Reparametrized], original: type[nn.Module]) -> type[Any]:
    """Return the subclass of both, the same one every time."""
    if (mixin, original) not in _MIXED:
        name = f"{mixin.prefix}{original.__name__}"
        _MIXED[mixin, original] = type(name, (mixin, original), {"__module__": mixin.__module__})
    return _MIXED[mixin, original]


def _restore(mixin: type[Reparametrized], original: type[nn.Module]) -> nn.Module:
    module: nn.Module = object.__new__(_mixed(mixin, original))
    return module


def smallest(tensor: Tensor) -> float:
    """Return what a norm is never divided below: torch's own weight norm gives NaN on a zero filter."""
    tiny: float = torch.finfo(tensor.dtype).tiny
    return float(tiny**0.5)
