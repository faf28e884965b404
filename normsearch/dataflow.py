"""Which convolution or linear layer feeds a site, and whether a scale may be folded into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx, nn

from normsearch.activations import asks_for_metadata
from normsearch.observation import Observation
from normsearch.tracing import WEIGHTED, Traces

#: Exact types whose output is linear in their weight; a subclass may do anything to it (StdConv2d does).
_FOLDABLE_TYPES = {
    f"torch.nn.modules.{name}"
    for name in (
        *(f"conv.Conv{d}d" for d in (1, 2, 3)),
        *(f"conv.ConvTranspose{d}d" for d in (1, 2, 3)),
        "linear.Linear",
    )
} | {"timm.layers.conv2d_same.Conv2dSame"}


@dataclass(frozen=True, kw_only=True)
class Producer:
    """The nearest convolution or linear layer upstream of a site.

    Attributes:
        path: the layer's path.
        layer: its class, with its module.
        foldable: whether a per-channel scale and shift may be folded into it: it feeds the site directly and
            nothing else, in train and in eval mode, and its weight is its own.
        detail: why not, where ``foldable`` is false.
        source: ``trace`` (torch.fx proved it) or ``hooks`` (seen in one forward pass).
        groups: its groups.
        transposed: whether it is a transposed convolution.
        aliases: further paths of the same layer.
        plain: whether its weight is a parameter of its own, which may be computed from others instead; False
            where it already is, as in a parametrized layer.

    """

    path: str
    layer: str
    foldable: bool
    detail: str | None
    source: Literal["trace", "hooks"]
    groups: int = 1
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    plain: bool = True


def find_producers(
    model: nn.Module,
    prefix: str,
    sites: Mapping[str, nn.Module],
    observation: Observation,
    traces: Traces,
) -> dict[str, Producer]:
    """Map site paths to producers: by torch.fx where it can trace, else by what a forward pass showed."""
    if not sites:
        return {}
    names = _all_names(model, prefix)
    found = _found(model, prefix, sites, observation, traces)
    return {
        site: replace(producer, aliases=tuple(name for name in names[producer.path] if name != producer.path))
        for site, producer in found.items()
    }


def _found(
    model: nn.Module,
    prefix: str,
    sites: Mapping[str, nn.Module],
    observation: Observation,
    traces: Traces,
) -> dict[str, Producer]:
    paths = {id(module): path for path, module in sites.items()}
    graph = traces.evaluating
    if isinstance(graph, str):
        # Good enough to find a weight upstream, not to prove that it may be folded into.
        usual = traces.with_defaults
        if not isinstance(usual, str):
            found = _in_graph(model, usual, paths, prefix, observation)
            why = "the model was traced with its default arguments only"
            return {site: replace(p, foldable=False, detail=p.detail or why) for site, p in found.items()}
        return {
            site: _producer(prefix, path, model.get_submodule(path), graph, "hooks")
            for site, path in observation.feeders.items()
        }
    found = _in_graph(model, graph, paths, prefix, observation)
    if any(producer.foldable for producer in found.values()):
        # A second reader may show in train mode alone (an auxiliary head does), and folding is for both.
        training = traces.training
        safe = {} if isinstance(training, str) else _in_graph(model, training, paths, prefix, observation)
        for site, producer in found.items():
            other = safe.get(site)
            if producer.foldable and (other is None or not other.foldable or other.path != producer.path):
                why = training if isinstance(training, str) else "in train mode it is read differently"
                layer = model.get_submodule(producer.path.removeprefix(prefix))
                found[site] = _producer(prefix, producer.path.removeprefix(prefix), layer, why, "trace")
    return found


def _in_graph(
    model: nn.Module, graph: fx.Graph, paths: Mapping[int, str], prefix: str, observation: Observation
) -> dict[str, Producer]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    found: dict[str, Producer] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        site = paths.get(id(model.get_submodule(node.target)))
        if site is None or site in found:
            continue
        feed = _feed(model, node)
        if feed is None:
            continue
        layer = model.get_submodule(str(feed.target))
        shapes = observation.shapes.get(site, [])
        detail = (
            _distance(feed, node)
            or _obstacle(layer, calls[feed.target], uses)
            or _reading(layer, calls[node.target], shapes)
            or _looked_at(model, graph, str(feed.target), str(node.target))
        )
        found[site] = _producer(prefix, str(feed.target), layer, detail, "trace")
    return found


def _all_names(model: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Map each weighted layer's path to every path that it has."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WEIGHTED):
            names.setdefault(id(module), []).append(f"{prefix}{path}")
    return {path: paths for paths in names.values() for path in paths}


def weight_as_site(model: nn.Module, path: str, aliases: tuple[str, ...]) -> Producer:
    """Return a convolution or linear layer as its own producer: a site without BatchNorm."""
    return replace(_producer("", path, model.get_submodule(path), None, "trace"), aliases=aliases)


def _producer(
    prefix: str, path: str, layer: nn.Module, detail: str | None, source: Literal["trace", "hooks"]
) -> Producer:
    return Producer(
        path=f"{prefix}{path}",
        layer=_name(layer),
        foldable=detail is None,
        detail=detail,
        source=source,
        plain=_is_plain(layer),
        groups=int(getattr(layer, "groups", 1)),
        transposed=bool(getattr(layer, "transposed", False)),
    )


def _feed(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the call of the nearest weighted layer upstream; one with a plain weight if there is any."""
    first = None
    for feed in _weighted_before(model, node):
        if _is_plain(model.get_submodule(str(feed.target))):
            return feed
        first = first or feed
    return first


def _is_plain(layer: nn.Module) -> bool:
    return layer._parameters.get("weight") is not None


def _weighted_before(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """Walk upstream breadth first and yield calls of weighted layers, past those without a plain weight."""
    queue, seen = list(node.all_input_nodes), set()
    while queue:
        here = queue.pop(0)
        if here in seen:
            continue
        seen.add(here)
        if here.op == "call_module":
            layer = model.get_submodule(str(here.target))
            if isinstance(layer, WEIGHTED):
                yield here
                if _is_plain(layer):
                    continue
        queue += here.all_input_nodes


def _distance(feed: fx.Node, node: fx.Node) -> str | None:
    if node.all_input_nodes != [feed]:
        return "other operations lie between it and the site"
    readers = [user for user in feed.users if not asks_for_metadata(user)]
    return None if readers == [node] else "its output is read elsewhere too"


#: What to call on a layer whose weight torch.nn.utils computes, by what is said of it.
REMOVAL = {
    "it is parametrized": "torch.nn.utils.parametrize.remove_parametrizations",
    "its weight is computed by torch.nn.utils.weight_norm": "torch.nn.utils.remove_weight_norm",
    "its weight is computed by torch.nn.utils.spectral_norm": "torch.nn.utils.remove_spectral_norm",
    "its weight is computed by torch.nn.utils.prune": "torch.nn.utils.prune.remove",
}


def _computed(layer: nn.Module) -> str:
    """Say what computes the weight of a layer without a plain one: the hook of that module, if one does."""
    by = (f"its weight is computed by {type(hook).__module__}" for hook in layer._forward_pre_hooks.values())
    return next(
        (detail for detail in by if detail in REMOVAL), "its weight is computed from other parameters"
    )


def _obstacle(layer: nn.Module, calls: int, uses: Counter[int]) -> str | None:
    name = type(layer).__name__
    if nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized"
    if not _is_plain(layer):
        return _computed(layer)
    if _name(layer) not in _FOLDABLE_TYPES:
        return f"{name} may transform its weight"
    if calls > 1:
        return f"it is called {calls} times per forward pass"
    if any(uses[id(parameter)] > 1 for parameter in layer._parameters.values() if parameter is not None):
        return "its weight is shared"
    return "it has forward hooks" if layer._forward_hooks or layer._forward_pre_hooks else None


def _reading(layer: nn.Module, calls: int, shapes: list[tuple[int, ...]]) -> str | None:
    if calls > 1:
        return f"the site is called {calls} times per forward pass"
    # (N, L, F) from a linear layer is read by BatchNorm1d with L as its channels, not the features.
    if isinstance(layer, nn.Linear) and {len(shape) for shape in shapes} != {2}:
        return "whether its features are the site's channels shows in a forward pass only: give inputs="
    return None


def _looked_at(model: nn.Module, graph: fx.Graph, producer: str, site: str) -> str | None:
    """Say who reads parameters or statistics that folding would change, beside the layers themselves."""
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] in (producer, site):
            return f"the model reads {node.target} elsewhere too"
    layer = model.get_submodule(site)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return "the site has forward hooks, which would see other values" if hooked else None


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
