"""Operators noted on tensors without numbers: the graph computes what the call computes, or is not given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from normsearch.aten_calls import Product, Sized, noted


def open_at(shape: tuple[int, ...], dims: set[int]) -> Tensor:
    """Return a fake tensor whose size is open in some dimensions."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(len(shape))]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(torch.empty(shape), symbolic_context=context)


def graph_of(forward: Callable[..., Tensor], x: Tensor, *state: Tensor) -> fx.Graph | None:
    return noted(forward, x, state, torch.contiguous_format)


def mixed(x: Tensor, weight: Tensor, counter: Tensor) -> Tensor:
    n, channels = x.shape[:2]
    counter.add_(1)
    ones = torch.ones(channels, device=x.device) + x.new_zeros(())
    parts = x.reshape(n * 2, channels // 2, -1).split(1, dim=1)
    whole = torch.cat([parts[0], parts[1]], 1).reshape(x.shape)
    count = x.new_full((), n * x.shape[2:].numel())
    y = nn.functional.group_norm(whole, 2, weight, ones.detach()) * (1 - count)
    return torch.where(y > 0, y, torch.zeros_like(y)).to(x.dtype)


@pytest.mark.parametrize("dims", [set(), {0}, {0, 2}, {0, 2, 3}])
def test_the_graph_computes_what_the_call_computes(dims: set[int]) -> None:
    weight, counter = torch.rand(4), torch.zeros(())
    graph = graph_of(mixed, open_at((3, 4, 5, 6), dims), weight, counter)
    assert graph is not None
    module = fx.GraphModule(nn.Module(), graph)
    for sizes in ((3, 4, 5, 6), (1, 4, 5, 6), (8, 4, 7, 2)):
        shape = [size if dim in dims else (3, 4, 5, 6)[dim] for dim, size in enumerate(sizes)]
        x, steps = torch.randn(shape), (torch.zeros(()), torch.zeros(()))
        assert torch.equal(module(x, weight, steps[0]), mixed(x, weight, steps[1]))
        assert steps[0] == steps[1] == 1
    values = [node.meta["val"] for node in graph.nodes if node.op != "output"]
    opened = [value for value in values if isinstance(value, Product)]
    assert bool(opened) == bool(dims)
    output = next(iter(reversed(graph.nodes))).args[0]
    assert isinstance(output, fx.Node)
    sized = output.meta["val"]
    assert isinstance(sized, Sized)
    found = [size.of((8, 4, 7, 2)) if isinstance(size, Product) else size for size in sized.size]
    assert found == [size if dim in dims else (3, 4, 5, 6)[dim] for dim, size in enumerate((8, 4, 7, 2))]


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda x: x * (1 / x.shape[0]), id="a fraction of an open size"),
        pytest.param(lambda x: x * (x.shape[0] + 1), id="a sum with one"),
        pytest.param(lambda x: x * 2 if x.shape[0] > 32 else x, id="a condition"),
        pytest.param(lambda x: sum(x.unbind(0)), id="as many operators as samples"),
        pytest.param(without_gradients, id="gradients switched off"),
        pytest.param(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), id="numbers of its own"),
        pytest.param(lambda x: x * float(x.sum()), id="a decision on numbers"),
    ],
)
def test_what_does_not_show_is_not_given(forward: Callable[..., Tensor]) -> None:
    assert graph_of(forward, open_at((3, 4), {0})) is None
