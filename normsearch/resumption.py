"""Run a model many times on one batch with a few layers replaced, from where the first of them acts on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from normsearch.forward import arguments, try_call

#: Old and new layers.
Pairs = Sequence[tuple[nn.Module, nn.Module]]
#: Picks the tensors to compare from a model's output.
Outputs = Callable[[Any], list[Tensor]]


@contextmanager
def substituted(pairs: Pairs) -> Iterator[None]:
    """Let new layers answer for old ones: a hook hands their output on, wherever the old ones are called.

    The model itself is not edited, so there is nothing to put back but the hooks. Hooks of the user's on an
    old layer see the new one's output.
    """
    with ExitStack() as stack:
        for old, new in pairs:
            handle = old.register_forward_hook(_Answering(new), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _Answering:
    """A forward hook that replaces a layer's output by another layer's."""

    def __init__(self, new: nn.Module) -> None:
        self._new = new

    def __call__(self, old: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what the new layer makes of the same input."""
        # A reparametrized layer shares the old one's hooks, this one included: its forward is called alone.
        shares = self._new._forward_hooks is old._forward_hooks
        return self._new.forward(*args, **kwargs) if shares else self._new(*args, **kwargs)


class Runs:
    """One batch through a model, as often as asked, each time with other layers replaced.

    Every run starts from the same inputs and random state, whatever a model does to either.
    """

    def __init__(self, model: nn.Module, inputs: Any, random: Tensor) -> None:
        self.model = model
        self.inputs = inputs
        self.random = random

    def start(self, pairs: Pairs) -> int:
        """Return where the first replaced layer acts; runs are made in this order."""
        return 0

    def output(self, pairs: Pairs) -> Any:
        """Return the output with new layers in the place of old ones."""
        torch.set_rng_state(self.random)
        with substituted(pairs):
            return try_call(self.model, copies(self.inputs))


class ResumedRuns(Runs):
    """Runs along a graph that execute what lies before the first replaced layer once for all of them."""

    def __init__(self, model: nn.Module, inputs: Any, random: Tensor, graph: fx.Graph) -> None:
        super().__init__(model, inputs, random)
        self._walk = _Walk(model, graph)
        self._walk.begin(_positional(model, copies(inputs)))
        self._nodes = list(graph.nodes)
        self._reached = 0
        self._first: dict[int, int] = {}
        for index, node in enumerate(self._nodes):
            if node.op == "call_module":
                for module in model.get_submodule(str(node.target)).modules():
                    self._first.setdefault(id(module), index)

    def start(self, pairs: Pairs) -> int:
        """Return the index of the first node that a replaced layer has a part in; else that of the output."""
        last = len(self._nodes) - 1
        return min((self._first.get(id(old), last) for old, _ in pairs), default=last)

    def output(self, pairs: Pairs) -> Any:
        """Return the output; each run starts no earlier than the one before."""
        start = self.start(pairs)
        assert start >= self._reached
        torch.set_rng_state(self.random)
        for node in self._nodes[self._reached : start]:
            self._walk.step(node)
        self._reached, self.random = start, torch.get_rng_state()
        kept = self._walk.env
        # What follows may work in place, and the next run starts here too.
        held = [node for node in kept if node.op != "get_attr"]
        self._walk.env = {**kept, **dict(zip(held, copies([kept[node] for node in held]), strict=True))}
        try:
            with substituted(pairs):
                result = None
                for node in self._nodes[start:]:
                    result = self._walk.step(node)
                return result
        finally:
            self._walk.env = kept


def resumed(whole: Runs, graph: fx.Graph | str, reference: list[Tensor], pick: Outputs) -> Runs:
    """Return runs along the graph if it computes what the model computes on this batch, else whole ones.

    A graph is one path through a model. For other shapes or arguments the model may take another, so its
    output is compared with the model's own.
    """
    if isinstance(graph, str):
        return whole
    try:
        output = pick(ResumedRuns(whole.model, whole.inputs, whole.random, graph).output(()))
    except Exception:
        # Whatever kept the graph from running: the model itself has run on this batch.
        return whole
    same = len(output) == len(reference) and all(map(_equal, output, reference))
    return ResumedRuns(whole.model, whole.inputs, whole.random, graph) if same else whole


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)


class _Walk(fx.Interpreter):
    """Execute nodes one by one, dropping values after their last use."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.env: dict[fx.Node, Any] = {}

    def begin(self, args: list[Any]) -> None:
        """Take the inputs of the forward pass."""
        self.args_iter = iter(args)

    def step(self, node: fx.Node) -> Any:
        """Execute one node and return its value."""
        value = self.env[node] = self.run_node(node)
        for used in self.user_to_last_uses.get(node, []):
            del self.env[used]
        return value


def _positional(model: nn.Module, inputs: Any) -> list[Any]:
    """Return inputs in the order of the forward's parameters, as a graph's placeholders take them."""
    given = arguments(inputs)
    if not given.kwargs:
        return list(given.args)
    bound = inspect.signature(model.forward).bind(*given.args, **given.kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError("keyword-only arguments have no place in the order")
    return list(bound.args)


def copies(value: Any) -> Any:
    """Return a structure with its tensors copied; views of one tensor are views of one copy."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        if (
            tensor.layout != torch.strided
            or tensor.is_quantized
            or type(tensor) not in (Tensor, nn.Parameter)
        ):
            return tensor.clone()
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storages[storage._cdata], *place)

    return tree_map_only(Tensor, copy, value)
