"""F.batch_norm calls as modules: a graph in which they are layers that can be found and replaced."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from normsearch.tracing import trace

BATCH_NORMS = (F.batch_norm, torch.batch_norm)
_SIGNATURE = inspect.signature(F.batch_norm)
_STATE = ("running_mean", "running_var", "weight", "bias")


class FunctionalBatchNorm(_BatchNorm):
    """A BatchNorm for any number of dimensions, made from one F.batch_norm call and holding its tensors."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (the parent's name)
        """Accept what the function accepts."""


def lifted(
    model: nn.Module, leaves: list[nn.Module], only: Collection[str] | None = None
) -> fx.GraphModule | str:
    """Return ``model`` as a graph whose F.batch_norm calls are modules, or why that cannot be.

    The graph shares every parameter, buffer and submodule with the model, which is not modified. A model
    that is no graph is traced; that is safe only where train and eval mode differ in nothing but the calls'
    training flag, since a graph has one mode.

    Args:
        model: a GraphModule, or a model that calls F.batch_norm itself.
        leaves: modules that a trace must not enter.
        only: the paths of the layers to make; a graph's other calls stay as they are. None makes all, and a
            model's are all made: its trace has fixed their mode.

    """
    if isinstance(model, fx.GraphModule):
        graph = fx.Graph()
        output = graph.graph_copy(model.graph, {}, return_output_node=True)
        assert isinstance(output, tuple)
        graph.output(output[0]).meta = dict(output[1].meta)
        return _lift(model, graph, only)
    traced = trace(model, leaves, training=False)
    training = trace(model, leaves, training=True)
    if isinstance(traced, str):
        return traced
    if isinstance(training, str):
        return training
    if _canonical(traced) != _canonical(training):
        return "its graphs in train and eval mode differ in more than the training flag"
    return _lift(model, traced, None)


def functional_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the F.batch_norm calls on activations; weight standardization normalizes a weight, not these."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in BATCH_NORMS and not _is_weight(_arguments(node)):
            yield node


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _is_weight(arguments: dict[str, Any]) -> bool:
    source = arguments["input"]
    while isinstance(source, fx.Node) and source.op in ("call_method", "call_function") and source.args:
        source = source.args[0]
    return isinstance(source, fx.Node) and source.op == "get_attr"


def _canonical(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The graph's computation without the calls' training flag and without the order of attribute reads."""
    numbers: dict[fx.Node, Any] = {}
    steps: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            numbers[node] = ("attribute", node.target)
            continue
        numbers[node] = ("step", len(steps))
        args, kwargs = node.args, node.kwargs
        if node.op == "call_function" and node.target in BATCH_NORMS:
            args, kwargs = (), {**_arguments(node), "training": None}
        named = {name: repr(map_arg(value, numbers.__getitem__)) for name, value in kwargs.items()}
        steps.append((node.op, node.target, repr(map_arg(args, numbers.__getitem__)), named))
    return steps


def _lift(root: nn.Module, graph: fx.Graph, only: Collection[str] | None) -> fx.GraphModule:
    places: list[tuple[str, FunctionalBatchNorm]] = []
    counters: set[str] = set()
    taken: set[str] = set()
    for node in list(functional_nodes(graph)):
        arguments = _arguments(node)
        sources = {name: arguments[name] for name in _STATE}
        if not all(source is None or _is_attribute(source) for source in sources.values()):
            # A computed γ or statistic belongs to no layer: the call stays, and find_sites reports it.
            continue
        owner = next((s.target.rpartition(".")[0] for s in sources.values() if s is not None), "")
        path = _free(root, f"{owner}.norm" if owner else "norm", taken)
        taken.add(path)
        if only is not None and path not in only:
            continue
        places.append((path, _layer(root, sources, arguments)))
        counters.add(f"{owner}.num_batches_tracked".removeprefix("."))
        with graph.inserting_before(node):
            new = graph.call_module(path, (arguments["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _erase_counters(graph, counters)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    # The constructor copies what the graph refers to, so each new layer must be there first.
    holder = fx.GraphModule(dict(places) | _referred(root, graph, places), graph)
    holder.training = root.training
    _restore_persistence(root, holder)
    holder.graph.lint()
    return holder


def _restore_persistence(root: nn.Module, holder: fx.GraphModule) -> None:
    """Keep buffers out of the state dict that are not in the model's: the constructor cannot know of them."""
    for node in holder.graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, name = node.target.rpartition(".")
        if name in root.get_submodule(owner)._non_persistent_buffers_set:
            holder.get_submodule(owner)._non_persistent_buffers_set.add(name)


def _referred(root: nn.Module, graph: fx.Graph, places: list[tuple[str, Any]]) -> dict[str, Any]:
    made = {path for path, _ in places}
    targets = {node.target for node in graph.nodes if node.op in ("get_attr", "call_module")} - made
    return {target: _attribute(root, target) for target in targets}


def _is_attribute(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _layer(
    root: nn.Module, sources: dict[str, fx.Node | None], arguments: dict[str, Any]
) -> FunctionalBatchNorm:
    tensors = {
        name: None if source is None else _attribute(root, str(source.target))
        for name, source in sources.items()
    }
    channels = next((int(t.shape[0]) for t in tensors.values() if t is not None), 0)
    layer = FunctionalBatchNorm(
        channels,
        arguments["eps"],
        arguments["momentum"],
        affine=False,
        track_running_stats=tensors["running_mean"] is not None,
        device="meta",
    )
    layer.affine = tensors["weight"] is not None
    for name in ("weight", "bias"):
        tensor = tensors[name]
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
        layer.register_parameter(name, tensor)
    if layer.track_running_stats:
        assert isinstance(tensors["running_mean"], Tensor)
        layer.running_mean, layer.running_var = tensors["running_mean"], tensors["running_var"]
        mean = sources["running_mean"]
        owner = root.get_submodule(str(mean.target).rpartition(".")[0]) if mean is not None else root
        counter = getattr(owner, "num_batches_tracked", None)
        if not isinstance(counter, Tensor):
            counter = torch.zeros((), dtype=torch.long, device=layer.running_mean.device)
        layer.num_batches_tracked = counter
    layer.training = bool(arguments["training"])
    return layer


def _free(root: nn.Module, path: str, taken: set[str]) -> str:
    """Return a path at which the model has nothing yet."""
    names = {name for name, _ in root.named_modules()} | taken
    candidates = (path if number == 0 else f"{path}_{number}" for number in range(len(names) + 1))
    return next(candidate for candidate in candidates if candidate not in names)


def _erase_counters(graph: fx.Graph, counters: set[str]) -> None:
    """Drop updates of these counters that a traced train mode wrote out: the layers count themselves."""
    for node in reversed(list(graph.nodes)):
        counts = node.op in ("call_method", "call_function") and node.args and _is_attribute(node.args[0])
        if counts and node.args[0].target in counters and not node.users:
            graph.erase_node(node)
