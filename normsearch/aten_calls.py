"""The ATen operators that a call makes, noted while it runs on tensors without numbers.

``make_fx`` finds the same operators by carrying symbols for open sizes through the call, which takes
milliseconds for each operator. Here an open size is a prime that nothing else is a multiple of: a number that
depends on it shows by its factors. A second run with other sizes must find the same operators with what those
numbers are there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: What the open sizes are in the two runs, by the order of the input's dimensions.
_SIZES = (1009, 1013, 1019, 1021, 1031)
_OTHERS = (2, 3, 5, 7, 11)
_LITERALS = (bool, float, str, torch.dtype, torch.layout, torch.memory_format, type(None))


@dataclass(frozen=True)
class Product:
    """A whole number that depends on open sizes of the input: ``factor`` times those of ``dims``."""

    factor: int
    dims: tuple[int, ...]

    def of(self, shape: Sequence[Any] | Mapping[int, int]) -> Any:
        """Return what it is for an input of this shape."""
        number = math.prod(shape[dim] for dim in self.dims)
        return number if self.factor == 1 else number * self.factor


@dataclass(frozen=True)
class Sized:
    """What is known of a tensor before there is an input."""

    size: tuple[int | Product, ...]
    stride: tuple[int | Product, ...]
    dtype: torch.dtype
    device: torch.device


def noted(
    forward: Callable[..., Tensor], x: Tensor, state: Sequence[Tensor], memory_format: torch.memory_format
) -> fx.Graph | None:
    """Return the operators that ``forward(x, *state)`` calls, composite ones whole, or None if unclear.

    Args:
        forward: the call.
        x: a fake tensor like those that it will get; its dynamic sizes are the open ones.
        state: its other arguments, of fixed sizes.
        memory_format: that of ``x``.

    Returns:
        A graph whose placeholders are the arguments. ``meta["val"]`` holds ``Sized`` for tensors and
        ``Product`` for open numbers.

    """
    dims = [dim for dim, size in enumerate(x.shape) if not isinstance(size, int)]
    try:
        run = _Run(forward, x, state, memory_format, dict(zip(dims, _SIZES, strict=False)))
        if dims:
            sizes = dict(zip(dims, _OTHERS, strict=False))
            other = _Run(forward, x, state, memory_format, sizes)
            if _at(run.calls, sizes) != other.calls or run.output != other.output:
                return None
    except Exception:
        # Also what the layer itself raises: tracing with symbols says what is wrong, and where.
        return None
    return run.graph()


class _UnclearError(Exception):
    """The operators alone do not say what the call does."""


class _Noting(ProxyTorchDispatchMode):
    """Notes every operator before it is taken apart: torch lets only its own modes stand there."""

    def __init__(self) -> None:
        # Not the parent's, which imports the compiler.
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.enter_stack = []
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = _called(func, args, kwargs or {})
        # A number or a dtype is no part of a graph; what it leads to is compared.
        if not isinstance(result, (*_LITERALS[:-1], int, torch.device)):
            self.calls.append((func, args, kwargs or {}, result))
        return result


#: The shape of what operators made of arguments of certain shapes, and how many are kept.
_SHAPES: dict[object, tuple[Any, ...]] = {}
_MOST_SHAPES = 10_000


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator on tensors without numbers, once for arguments of the same shapes.

    Finding a shape takes up to a millisecond, and a network has the same ones again and again. What returns
    its argument or a view of it is always called.
    """
    returns = func._schema.returns
    if len(returns) == 1 and returns[0].alias_info is None:
        key = (func, _key(args), _key(tuple(kwargs.items())))
        known = _SHAPES.get(key)
        if known is not None:
            size, stride, dtype, device = known
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
    # The kernels' own shapes, not those of their Python counterparts, which take twice as long.
    with no_python_dispatcher():
        result = func(*args, **kwargs)
    if len(returns) == 1 and returns[0].alias_info is None and isinstance(result, Tensor):
        if len(_SHAPES) >= _MOST_SHAPES:
            _SHAPES.clear()
        _SHAPES[key] = (result.shape, result.stride(), result.dtype, result.device)
    return result


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    # A number's type decides the result's.
    return tuple(map(_key, value)) if isinstance(value, list | tuple) else (type(value), value)


class _WithGradients(TorchFunctionMode):
    """Gradients that are switched off inside a call are no operator."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            raise _UnclearError
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Place:
    """A tensor, by its number: the inputs', then the results' in the order in which they were made."""

    number: int


@dataclass
class _Call:
    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Sized]
    several: bool


class _Run:
    """One run with certain numbers as open sizes.

    Attributes:
        inputs: what is known of x and the state.
        calls: the operators.
        output: which tensor was returned.

    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        x: Tensor,
        state: Sequence[Tensor],
        memory_format: torch.memory_format,
        sizes: Mapping[int, int],
    ) -> None:
        self.sizes, self.device = sizes, x.device
        shape = [sizes.get(dim, size) for dim, size in enumerate(x.shape)]
        copies: dict[int, Tensor] = {}
        for tensor in state:
            copies.setdefault(id(tensor), torch.empty_like(tensor, device="meta", requires_grad=False))
        inputs = [
            torch.empty(shape, dtype=x.dtype, device="meta", memory_format=memory_format),
            *(copies[id(tensor)] for tensor in state),
        ]
        noting = _Noting()
        with enable_python_dispatcher(), _WithGradients(), noting:
            output = forward(*inputs)
        self.places: dict[object, _Place] = {}
        self.count = 0
        self.inputs = [self._placed(tensor, own=True) for tensor in inputs]
        self.calls = [self._call(*call) for call in noting.calls]
        self.output = self._place(output)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Call:
        arguments = tuple(map(self._argument, args))
        named = {name: self._argument(value) for name, value in kwargs.items()}
        several = not isinstance(result, Tensor)
        returns = target._schema.returns
        results = [
            self._placed(part, own=returns[min(index, len(returns) - 1)].alias_info is None)
            for index, part in enumerate(result if several else [result])
        ]
        return _Call(target, arguments, named, results, several)

    def _placed(self, tensor: Tensor, *, own: bool) -> Sized:
        """Number a tensor; ``own`` says that it is no view of another one."""
        self.places[id(tensor)] = place = _Place(self.count)
        self.count += 1
        if own:
            self.places[_memory(tensor)] = place
        size, stride = (tuple(map(self._number, part)) for part in (tensor.shape, tensor.stride()))
        return Sized(size, stride, tensor.dtype, self._argument(tensor.device))

    def _place(self, tensor: Tensor) -> _Place:
        # What makes a tensor of nothing hands on another object than the one that was noted.
        place = self.places.get(id(tensor)) or self.places.get(_memory(tensor))
        if place is None:
            raise _UnclearError
        return place

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._place(value)
        if isinstance(value, list | tuple):
            return [self._argument(part) for part in value]
        if isinstance(value, torch.device):
            return self.device if value.type == "meta" else value
        if isinstance(value, _LITERALS):
            return value
        if isinstance(value, int):
            return self._number(value)
        raise _UnclearError

    def _number(self, value: int) -> int | Product:
        """Return a number as a product of open sizes, if it has their factors."""
        dims = []
        if min(self.sizes.values(), default=0) >= min(_SIZES):
            for dim, size in self.sizes.items():
                while value and value % size == 0:
                    value //= size
                    dims.append(dim)
        return Product(value, tuple(dims)) if dims else value

    def graph(self) -> fx.Graph:
        """Return the calls as a graph."""
        graph = fx.Graph()
        tensors: list[fx.Node] = []
        numbers: dict[Product, fx.Node] = {}
        for index, sized in enumerate(self.inputs):
            tensors.append(graph.placeholder(f"arg{index}_1"))
            tensors[-1].meta["val"] = sized

        def call(
            target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, name: str
        ) -> fx.Node:
            node = graph.create_node("call_function", target, args, kwargs, graph._target_to_str(name))
            node.meta["val"] = value
            return node

        def number(value: Product) -> fx.Node:
            if value in numbers:
                return numbers[value]
            first, last = Product(1, value.dims[:-1]), Product(1, value.dims[-1:])
            if value.factor != 1:
                args = (number(Product(1, value.dims)), value.factor)
                node = call(operator.mul, args, {}, value, "mul")
            elif first.dims:
                node = call(operator.mul, (number(first), number(last)), {}, value, "mul")
            else:
                node = call(torch.ops.aten.sym_size.int, (tensors[0], value.dims[0]), {}, value, "sym_size")
            return numbers.setdefault(value, node)

        def argument(value: Any) -> Any:
            if isinstance(value, _Place):
                return tensors[value.number]
            if isinstance(value, list):
                return [argument(part) for part in value]
            return number(value) if isinstance(value, Product) else value

        for one in self.calls:
            args, kwargs = tuple(map(argument, one.args)), {k: argument(v) for k, v in one.kwargs.items()}
            value = tuple(one.results) if one.several else one.results[0]
            node = call(one.target, args, kwargs, value, one.target.overloadpacket.__name__)
            if not one.several:
                tensors.append(node)
                continue
            for index, sized in enumerate(one.results):
                tensors.append(call(operator.getitem, (node, index), {}, sized, "getitem"))
        graph.output(argument(self.output))
        return graph


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _at(value: Any, sizes: Mapping[int, int]) -> Any:
    """Return what was noted with these numbers as open sizes."""
    if isinstance(value, Product):
        return value.of(sizes)
    if isinstance(value, list | tuple):
        return type(value)(_at(part, sizes) for part in value)
    if isinstance(value, dict):
        return {name: _at(part, sizes) for name, part in value.items()}
    if isinstance(value, Sized):
        return Sized(_at(value.size, sizes), _at(value.stride, sizes), value.dtype, value.device)
    if isinstance(value, _Call):
        args, kwargs = _at(value.args, sizes), _at(value.kwargs, sizes)
        return _Call(value.target, args, kwargs, _at(value.results, sizes), value.several)
    return value
