"""A layer as plain ATen operators: what its forward pass does, written down for a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from normsearch.aten_calls import Product, Sized, noted
from normsearch.errors import ModelError
from normsearch.moments import as_operators
from normsearch.operators import example

#: The sizes that dynamic dimensions have while a layer is written down: none that a rule may depend on.
_SIZES = (53, 59, 61, 67, 71)
#: Where the choice of a kernel, as of a convolution by its batch size, leaves conditions: same results.
_KERNELS = "_subclasses/fake_impls.py"
#: Sizes for which a condition that tracing met must hold.
_TRIED = (2, 3, 5, 16, 31, 32, 33, 64, 1000, 4096)


@dataclass(frozen=True)
class Written:
    """A layer's forward pass as a graph of ATen operators.

    Attributes:
        graph: its placeholders are the input, then the layer's parameters and buffers in order.
        state: their names.
        mutated: in functional form, the new value of each buffer that the layer updates, by name; else empty,
            since the operators update the buffers in place.

    """

    graph: fx.Graph
    state: tuple[str, ...]
    mutated: dict[str, fx.Node]


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's parameters and buffers by name, shared ones under each."""
    state: dict[str, Tensor] = dict(layer.named_parameters(remove_duplicate=False))
    return state | dict(layer.named_buffers(remove_duplicate=False))


def written(layer: nn.Module, x: Tensor, *, functional: bool, site: str) -> Written:
    """Write down what a layer makes of an input.

    Args:
        layer: the layer; it is not modified.
        x: a fake tensor like those that it will get; its dynamic sizes stay dynamic.
        functional: whether operators that work in place are to be avoided, as decomposed programs do.
        site: what the layer is called in an error.

    Raises:
        ModelError: the layer depends on a dynamic size in a way that operators cannot express.

    """
    state = state_of(layer)

    def forward(x: Tensor, *tensors: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(state, tensors, strict=True)), (x,))

    if not functional:
        with as_operators():
            graph = noted(forward, x, list(state.values()), _memory_format(x))
        if graph is not None:
            return _tidied(graph, tuple(state), functional=False)
    mode, symbols = _symbols()
    with mode:
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in state.values()]
        fake = torch.empty(
            [size if isinstance(size, int) else symbols[index] for index, size in enumerate(x.shape)],
            dtype=x.dtype,
            device=x.device,
            memory_format=_memory_format(x),
        )

    try:
        with mode, as_operators():
            module = _traced(forward, fake, fakes, functional=functional)
    except Exception as error:
        _symbols.cache_clear()
        raise ModelError(
            f"{site}: {type(layer).__name__} cannot be written as operators for an input of shape "
            f"{tuple(x.shape)} ({type(error).__name__}: {error}); export the model with a fixed batch size, "
            "or choose another method for this site"
        ) from error
    condition = _condition(mode)
    if condition is not None:
        _symbols.cache_clear()
        raise ModelError(
            f"{site}: {type(layer).__name__} takes another form where not {condition}, and the program "
            f"leaves sizes of its input {tuple(x.shape)} open; export the model with a fixed batch size, or "
            "choose another method for this site"
        )
    return _tidied(module.graph, tuple(state), functional=functional)


def _traced(
    forward: Callable[..., Any], x: Tensor, state: Sequence[Tensor], *, functional: bool
) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    if not functional:
        return make_fx(forward, pre_dispatch=True)(x, *state)
    pure = torch.func.functionalize(forward, remove="mutations")
    return make_fx(pure, decomposition_table=_decompositions())(x, *state)


@cache
def _symbols() -> tuple[FakeTensorMode, tuple[torch.SymInt, ...]]:
    """The sizes that dynamic dimensions have while layers are written down, in a world of their own."""
    # With sympy it takes half a second to import, which only programs with open sizes need.
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC for _ in _SIZES])
    probe = mode.from_tensor(torch.empty(_SIZES, device="meta"), symbolic_context=context)
    return mode, tuple(probe.shape)  # type: ignore[arg-type]


def _condition(mode: FakeTensorMode) -> str | None:
    """Return a condition on open sizes under which alone what was written down is right, if there is one.

    Tracing takes the way that its example takes and notes every condition that it met. Those that hold for
    all sizes from 2 on are harmless; sizes of 1 differ in strides alone.
    """
    import sympy

    assert mode.shape_env is not None
    for symbol, value in mode.shape_env.replacements.items():
        return f"{symbol} = {value}"
    for guard in mode.shape_env.guards:
        if _KERNELS in str(guard.sloc):
            continue
        for size in _TRIED:
            if guard.expr.xreplace(dict.fromkeys(guard.expr.free_symbols, sympy.Integer(size))) != sympy.true:
                return str(guard.expr)
    return None


def in_program(written: Written, x: Tensor, mode: FakeTensorMode) -> dict[fx.Node, Any]:
    """Return what each node of ``Written.graph`` is in a program whose input there is ``x``."""
    made: dict[Sized, Tensor] = {}

    def empty(size: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty_strided(
            [number(part) for part in size], [number(part) for part in stride], dtype=dtype, device=device
        )

    def number(value: Any) -> Any:
        if isinstance(value, Product):
            return value.of(x.shape)
        return _of_symbols(value, x, mode) if isinstance(value, torch.SymInt | torch.SymFloat) else value

    def translated(value: Any) -> Any:
        if isinstance(value, Sized):
            if value not in made:
                made[value] = empty(value.size, value.stride, value.dtype, value.device)
            return made[value]
        if isinstance(value, Tensor):
            return empty(value.shape, value.stride(), value.dtype, value.device)
        return number(value)

    with unguarded(mode):
        return {
            node: tree_map(translated, node.meta["val"])
            for node in written.graph.nodes
            if node.op == "call_function"
        }


def _of_symbols(value: Any, x: Tensor, mode: FakeTensorMode) -> Any:
    """Return a number of the symbols' world in that of a program."""
    assert mode.shape_env is not None
    sizes: dict[Any, Any] = {
        symbol.node.expr: size
        for symbol, size in zip(_symbols()[1], x.shape, strict=False)
        if not isinstance(size, int)
    }
    expression = value.node.expr.xreplace({symbol: size.node.expr for symbol, size in sizes.items()})
    number = value.node.expr.xreplace({symbol: example(size) for symbol, size in sizes.items()})
    if isinstance(value, torch.SymFloat):
        return mode.shape_env.create_symfloatnode(expression, hint=float(number))
    return mode.shape_env.create_symintnode(expression, hint=int(number))


@cache
def _decompositions() -> dict[Any, Any]:
    return dict(torch.export.default_decompositions())


def _memory_format(x: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    with unguarded(getattr(x, "fake_mode", None) or FakeTensorMode()):
        if x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()]):
            return formats[x.dim()]
    return torch.contiguous_format


def _tidied(graph: fx.Graph, state: tuple[str, ...], *, functional: bool) -> Written:
    """Drop what only the way of tracing left behind."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    mutated = {}
    for node in list(graph.nodes):
        if functional and node.target is torch.ops.aten.alias.default:
            # What tracing below autograd makes of detach; a program may be trained on.
            node.target = torch.ops.aten.detach.default
        elif functional and node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders:
            mutated[state[placeholders.index(node.args[0]) - 1]] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in mutated.values() and not node.is_impure():
            graph.erase_node(node)
    return Written(graph, state, mutated)


@contextmanager
def unguarded(mode: FakeTensorMode) -> Iterator[None]:
    """Compute values of a program's own kind without adding conditions to its inputs."""
    with mode, torch.no_grad(), enable_python_dispatcher():
        if mode.shape_env is None:
            yield
            return
        with mode.shape_env.suppress_guards():
            yield
