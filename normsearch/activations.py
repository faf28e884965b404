"""Which activation reads a site, and whether a method that brings its own may take its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from normsearch.tracing import Traces

_MODULES = ("torch.nn.modules.activation", "timm.layers.activations")
#: Activations that are called as functions or as methods of a tensor, without a trailing underscore.
_FUNCTIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "hardswish"),
    *("hardtanh", "hardsigmoid", "sigmoid", "tanh", "softplus"),
}


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The activation that a site's output goes through.

    Attributes:
        path: the module's path; the caller of a function has none.
        layer: its class with its module, or the function.
        removable: whether it may be taken out: it reads the site's output, nothing else does, it is called
            there only, in train and in eval mode.
        detail: why not, where ``removable`` is false.
        inside: whether it is part of the layer that stands at the site (timm's norm + act layers).

    """

    path: str
    layer: str
    removable: bool
    detail: str | None = None
    inside: bool = False


def activation_inside(layer: nn.Module, path: str) -> Activation | None:
    """Return the activation that a fused norm + act layer carries, if it has one that does anything."""
    act, drop = layer._modules.get("act"), layer._modules.get("drop")
    if act is None or isinstance(act, nn.Identity):
        return None
    detail = _hooks(act, "it")
    if not isinstance(drop, nn.Identity | None):
        detail = "dropout lies between the normalization and it"
    return Activation(
        path=f"{path}.act" if path else "act",
        layer=_name(act),
        removable=detail is None,
        detail=detail,
        inside=True,
    )


def find_activations(
    model: nn.Module, prefix: str, sites: Mapping[str, nn.Module], traces: Traces
) -> dict[str, Activation]:
    """Map site paths to the activations that read them, as far as torch.fx shows it."""
    graph = traces.evaluating
    if isinstance(graph, str):
        return {}
    paths = {id(module): path for path, module in sites.items()}
    found = dict(_in_graph(model, prefix, graph, paths))
    if not any(activation.removable for activation in found.values()):
        return found
    training = traces.training
    # In train mode alone an auxiliary head may read a site too, and what is taken out is so for both.
    other = {} if isinstance(training, str) else dict(_in_graph(model, prefix, training, paths))
    why = training if isinstance(training, str) else "in train mode the site is read differently"
    return {
        site: replace(activation, removable=False, detail=why)
        if activation.removable and other.get(site) != activation
        else activation
        for site, activation in found.items()
    }


def asks_for_metadata(node: fx.Node) -> bool:
    """Tell whether a node looks at a tensor's shape only, as inlined checks of the input's rank do."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("ndim", "shape", "dtype", "device")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname in ("sym_size", "sym_stride", "sym_numel", "_assert_tensor_metadata")
    return node.op == "call_method" and node.target in ("size", "dim")


def _in_graph(
    model: nn.Module, prefix: str, graph: fx.Graph, paths: Mapping[int, str]
) -> Iterator[tuple[str, Activation]]:
    modules = {
        node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"
    }
    calls = Counter(id(module) for module in modules.values())
    for node, module in modules.items():
        site = paths.get(id(module))
        if site is None:
            continue
        readers = _readers(node, modules)
        for reader in readers:
            act = modules.get(reader)
            if act is not None and _is_activation(act):
                detail = (
                    _times("the site", calls[id(module)])
                    or _times("it", calls[id(act)])
                    or ("what it reads is read elsewhere too" if len(readers) > 1 else None)
                    or _hooks(act, "it")
                    or _hooks(module, "the site")
                )
                path = f"{prefix}{reader.target}"
                yield (
                    site,
                    Activation(path=path, layer=_name(act), removable=detail is None, detail=detail),
                )
                break
            name = _function(reader)
            if name is not None:
                layer = f"torch.nn.functional.{name}"
                why = "it is a call in a forward method, not a module"
                yield site, Activation(path="", layer=layer, removable=False, detail=why)
                break


def _readers(node: fx.Node, modules: Mapping[fx.Node, nn.Module]) -> list[fx.Node]:
    """Return what reads a value, past modules that do nothing (timm's drop_block where there is none)."""
    readers = [user for user in node.users if not asks_for_metadata(user)]
    while len(readers) == 1 and type(modules.get(readers[0])) is nn.Identity:
        if _hooks(modules[readers[0]], "it"):
            return readers
        readers = [user for user in readers[0].users if not asks_for_metadata(user)]
    return readers


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_MODULES) and not isinstance(module, nn.MultiheadAttention)


def _function(node: fx.Node) -> str | None:
    if node.op not in ("call_function", "call_method"):
        return None
    name = getattr(node.target, "__name__", str(node.target))
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._opname
    name = name.removesuffix("_")
    return name if name in _FUNCTIONS else None


def _times(what: str, calls: int) -> str | None:
    return f"{what} is called {calls} times per forward pass" if calls > 1 else None


def _hooks(module: nn.Module, what: str) -> str | None:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return f"{what} has forward hooks, which would see other values" if hooked else None


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
