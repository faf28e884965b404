"""Which convolution or linear layer feeds a site, and whether it may be folded into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from normsearch.observation import Observation
from normsearch.tracing import WEIGHTED, trace

#: Exact types whose output is linear in their weight; a subclass may do anything to it (StdConv2d does).
_FOLDABLE_TYPES = {
    f"torch.nn.modules.{name}"
    for name in (
        *(f"conv.Conv{d}d" for d in (1, 2, 3)),
        *(f"conv.ConvTranspose{d}d" for d in (1, 2, 3)),
        "linear.Linear",
    )
} | {"timm.layers.conv2d_same.Conv2dSame"}

#: Ways to look at the same numbers, per channel unchanged, between a producer and its site.
_VIEWS = {
    torch.flatten,
    torch.reshape,
    torch.transpose,
    torch.permute,
    torch.squeeze,
    torch.unsqueeze,
    "flatten",
    "view",
    "reshape",
    "transpose",
    "permute",
    "contiguous",
    "squeeze",
    "unsqueeze",
}


@dataclass(frozen=True, kw_only=True)
class Producer:
    """The convolution or linear layer whose output reaches a site.

    Attributes:
        path: the layer's path.
        layer: its class, with its module.
        foldable: whether a per-channel affine may be folded into its weight.
        detail: why not, where ``foldable`` is false.
        source: ``trace`` (torch.fx proved it) or ``hooks`` (seen in one forward pass).

    """

    path: str
    layer: str
    foldable: bool
    detail: str | None
    source: Literal["trace", "hooks"]


def find_producers(
    model: nn.Module, prefix: str, sites: Mapping[str, nn.Module], observation: Observation
) -> dict[str, Producer]:
    """Map site paths to producers: by torch.fx where it can trace, else by what a forward pass showed."""
    if not sites:
        return {}
    paths = {id(module): path for path, module in sites.items()}
    graph = trace(model, list(sites.values()))
    if isinstance(graph, str):
        return {
            site: Producer(
                path=f"{prefix}{path}",
                layer=_name(model.get_submodule(path)),
                foldable=False,
                detail=graph,
                source="hooks",
            )
            for site, path in observation.feeders.items()
        }
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    tied = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or not node.args:
            continue
        path = paths.get(id(model.get_submodule(node.target)))
        feed, only_reader = _feeding(node)
        if path is None or feed is None or feed.op != "call_module":
            continue
        layer = model.get_submodule(str(feed.target))
        if not isinstance(layer, WEIGHTED):
            continue
        detail = _obstacle(layer, calls[feed.target], tied, only_reader and calls[node.target] == 1)
        found[path] = Producer(
            path=f"{prefix}{feed.target}",
            layer=_name(layer),
            foldable=detail is None,
            detail=detail,
            source="trace",
        )
    return found


def _feeding(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """Follow views up to what feeds ``node``, and tell whether ``node`` is its only reader."""
    only = True
    feed = node.args[0]
    while isinstance(feed, fx.Node):
        only = only and len(feed.users) == 1
        if feed.op in ("call_method", "call_function") and feed.target in _VIEWS and feed.args:
            feed = feed.args[0]
            continue
        return feed, only
    return None, False


def _obstacle(layer: nn.Module, calls: int, tied: Counter[int], only_reader: bool) -> str | None:
    name = type(layer).__name__
    if _name(layer) not in _FOLDABLE_TYPES:
        return f"{name} may transform its weight"
    if nn.utils.parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if calls > 1:
        return f"it is called {calls} times per forward pass"
    if any(tied[id(parameter)] > 1 for parameter in layer._parameters.values() if parameter is not None):
        return "its weight is shared"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    return None if only_reader else "its output is read elsewhere too"


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
