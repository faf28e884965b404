"""What the names in a state dict's pickle mean: storages and tensors, described instead of made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

MOST_DIMENSIONS = 64

_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_ORDERED, _COUNTER = "collections OrderedDict", "collections Counter"
_SIZE, _DEVICE = "torch Size", "torch device"
ALLOWED = {*_DTYPES, _TENSOR, _PARAMETER, _ORDERED, _COUNTER, _SIZE, _DEVICE} | {
    str(dtype).replace(".", " ") for dtype in _DTYPES.values()
}


#: What may be a key, or a value beside tensors.
SCALARS = (str, int, float, bool, type(None))


class PickleError(Exception):
    """A pickle is not one of plain tensors; the message completes a sentence about the file."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to; it is never imported."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors: a key into the file, dtype and count."""

    key: str
    dtype: torch.dtype
    elements: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Described:
    """A tensor as the pickle describes it; its elements all lie inside its storage, each at most once."""

    storage: Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def matches(self, tensor: torch.Tensor) -> bool:
        """Tell whether ``tensor`` is what was described."""
        return (
            tensor.shape == self.shape
            and tensor.dtype == self.storage.dtype
            and (not tensor.numel() or tensor.stride() == self.strides)
        )


def storages(value: Any) -> dict[str, Storage]:
    """Return every storage that the tensors in ``value`` refer to, by key.

    Raises:
        PickleError: one key is described in two ways.

    """
    found: dict[str, Storage] = {}
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Described):
            first = found.setdefault(item.storage.key, item.storage)
            if first != item.storage:
                raise PickleError(f"describes its storage {item.storage.key[:60]!r} in two ways")
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)
    return found


def expect(value: Any, kind: type[Any]) -> Any:
    """Return ``value`` if it is of exactly this type."""
    if type(value) is not kind:
        raise PickleError(f"is malformed (a {type(value).__name__} where a {kind.__name__} belongs)")
    return value


def refused(name: str) -> str:
    """Say what a name is that was not accepted."""
    dotted = name.replace(" ", ".")[:200]
    if "_rebuild" in name or "Storage" in name:
        return f"holds tensors of a kind that is not supported ({dotted})"
    return (
        f"holds a pickled object, {dotted!r}, which would run code when it is loaded (a whole model, or a "
        "training checkpoint's settings)"
    )


def reduced(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Return what a call of an accepted name stands for; nothing is called."""
    if function.name == _TENSOR:
        return _tensor(arguments)
    if function.name == _PARAMETER and len(arguments) == 3:
        return expect(arguments[0], Described)
    if function.name in (_ORDERED, _COUNTER) and len(arguments) <= 1:
        initial = arguments[0] if arguments else {}
        return dict(expect(initial, dict if function.name == _COUNTER or not arguments else list))
    if function.name == _SIZE and len(arguments) == 1:
        return _whole(arguments[0])
    if function.name == _DEVICE and 1 <= len(arguments) <= 2:
        return ":".join(str(part)[:60] for part in arguments if type(part) in SCALARS)
    raise PickleError(f"calls {function.name.replace(' ', '.')} in an unusual way")


def storage_of(identity: Any) -> Storage:
    """Return the storage that a persistent id names."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise PickleError("refers to something outside that is no tensor")
    _, kind, key, _, elements, *view = identity
    if (
        type(kind) is not Global
        or kind.name not in _DTYPES
        or type(key) is not str
        or view not in ([], [None])
    ):
        raise PickleError("refers to numbers of a kind that is not supported")
    if type(elements) is not int or not 0 <= elements < 2**48:
        raise PickleError(f"claims a storage of {elements!s:.40} elements")
    return Storage(key, _DTYPES[kind.name], elements)


def _tensor(arguments: tuple[Any, ...]) -> Described:
    if len(arguments) not in (6, 7):
        raise PickleError("is malformed (a tensor with missing parts)")
    storage, offset, shape, strides, _, hooks = arguments[:6]
    expect(storage, Storage)
    shape, strides = _whole(shape), _whole(strides)
    if hooks or type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise PickleError("describes a tensor that torch.save would not write")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= storage.elements:
        raise PickleError(f"has a tensor of shape {shape} that reaches beyond its {storage.elements} numbers")
    if count > storage.elements:
        raise PickleError(
            f"has a tensor of shape {shape} made of {storage.elements} numbers repeated, which would be "
            f"{count * storage.dtype.itemsize:,} bytes once copied"
        )
    return Described(storage, shape, strides)


def _whole(value: Any) -> tuple[int, ...]:
    if type(value) not in (tuple, list) or len(value) > MOST_DIMENSIONS:
        raise PickleError("describes a shape that is no tuple of whole numbers")
    if any(type(item) is not int or not 0 <= item < 2**48 for item in value):
        raise PickleError("describes a shape that is no tuple of whole numbers")
    return tuple(value)
