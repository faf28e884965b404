"""Where an ONNX graph normalizes: its BatchNormalization nodes as sites."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from normsearch.methods import TrainedNorm
from normsearch.onnx_graph.graphs import DOMAINS, Shapes, constant, infer, opset, tensor_of
from normsearch.onnx_graph.neighbours import find_activation, find_producer
from normsearch.sites import STATE, NormSite, broken_statistics, is_trained

LAYER = "onnx.BatchNormalization"
PARAMETERS = ("scale", "bias", "mean", "variance")
_RANKS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_ANY_RANK = (2, 3, 4, 5)
_EPS = 1e-5
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Place:
    """A BatchNormalization node with what is known about it.

    Attributes:
        site: the node as plain data.
        node: the node itself.
        parameters: γ, β, μ and σ² in double precision; None where the site cannot be rewritten.
        dtype: of the node's input; None where it is not known.
        rank: of the node's input; None where it is not known.

    """

    site: NormSite
    node: ir.Node
    parameters: tuple[Tensor, Tensor, Tensor, Tensor] | None
    dtype: ir.DataType | None
    rank: int | None

    def trained(self) -> TrainedNorm:
        """Return what a method is initialised from, by way of torch's own layer."""
        assert self.parameters is not None
        assert self.site.channels is not None
        layer = _RANKS.get(self.rank or 4, nn.BatchNorm2d)(
            self.site.channels, self.site.eps, self.site.momentum, dtype=torch.float64
        )
        with torch.no_grad():
            values = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            for own, value in zip(values, self.parameters, strict=True):
                assert own is not None
                own.copy_(value)
        return TrainedNorm.of(layer.eval(), self.site)


def find_places(model: ir.Model, shapes: Shapes | None = None) -> tuple[Place, ...]:
    """Find every BatchNormalization node, in subgraphs and functions too, in the graph's order.

    Args:
        model: the model.
        shapes: of its values; inferred where they are not given.

    Raises:
        ModelError: the model is written for an opset that is not rewritten.

    """
    opset(model)
    shapes = infer(model) if shapes is None else shapes
    nodes = [(node, None) for node in batch_norms(model)]
    inside = [
        (node, function.name)
        for function in model.functions.values()
        for node in function.all_nodes()
        if _is_batch_norm(node)
    ]
    found = [*nodes, *inside]
    paths = _paths([node for node, _ in found])
    return tuple(
        _place(node, path, shapes, within) for (node, within), path in zip(found, paths, strict=True)
    )


def batch_norms(model: ir.Model) -> list[ir.Node]:
    """Return the BatchNormalization nodes outside functions, in the order of ``find_places``."""
    return [node for node in model.graph.all_nodes() if _is_batch_norm(node)]


def _is_batch_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in DOMAINS


def _paths(nodes: Sequence[ir.Node]) -> list[str]:
    """Return each node's name, its output's where others have it too; numbered where that is taken."""
    counts = Counter(node.name for node in nodes)
    # A dict keeps the order.
    paths: dict[str, None] = {}
    for node in nodes:
        own = node.name if node.name and counts[node.name] == 1 else node.outputs[0].name or ""
        path, number = own, 1
        while path in paths:
            number += 1
            path = f"{own}#{number}"
        paths[path] = None
    return list(paths)


def _place(node: ir.Node, path: str, shapes: Shapes, function: str | None) -> Place:
    source = node.inputs[0]
    name = "" if source is None else source.name or ""
    sizes, dtype = shapes.sizes.get(name), shapes.dtypes.get(name)
    eps, momentum = (_number(node, key, default) for key, default in _NUMBERS)
    given = [constant(value) for value in node.inputs[1:]]
    rank = None if sizes is None else len(sizes)
    detail = next(_obstacles(node, given, function, rank, dtype, eps), None)
    parameters = None
    if detail is None:
        scale, bias, mean, variance = (value for value in given if value is not None)
        parameters = (scale, bias, mean, variance)
    broken = None if parameters is None else broken_statistics(parameters[2], parameters[3], eps)
    channels = None if parameters is None else len(parameters[0])
    site = NormSite(
        path=path,
        kind="batch" if detail is None else "custom",
        layer=LAYER,
        channels=channels,
        eps=eps,
        # torch's is the share of the new batch, ONNX's that of the old statistics.
        momentum=round(1 - momentum, 7),
        affine=True,
        bias=True,
        track_running_stats=True,
        trained=None if parameters is None else is_trained(dict(zip(STATE, parameters, strict=False))),
        ranks=_ANY_RANK if rank is None else (rank,),
        input_shapes=() if sizes is None or channels is None else tuple(_known(sizes, channels)),
        producer=None if function else find_producer(node, rank, channels),
        followed_by=None if function else find_activation(node),
        detail=detail or broken,
    )
    return Place(site, node, None if broken else parameters, dtype, rank)


_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NUMBERS = (("epsilon", _EPS), ("momentum", _MOMENTUM))


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref():
        return default
    # Single precision in the file: 1e-5 is meant, not 9.99999974e-06.
    return float(f"{attribute.as_float():.7g}")


def _obstacles(
    node: ir.Node,
    given: list[Tensor | None],
    function: str | None,
    rank: int | None,
    dtype: ir.DataType | None,
    eps: float,
) -> Iterator[str]:
    """Say why a node cannot be rewritten."""
    if function is not None:
        yield f"it stands in the function {function!r}; inline functions first (onnx.inliner)"
    training = node.attributes.get("training_mode")
    used = [value for value in node.outputs[1:] if value.uses() or value.is_graph_output()]
    if (training is not None and not training.is_ref() and training.as_int()) or used:
        yield "it is in training mode and normalizes by the batch; export the model in eval mode"
    for name, value in zip(PARAMETERS, given, strict=False):
        if value is None:
            yield f"its {name} is computed in the graph, not a constant"
    if len(given) != len(PARAMETERS) or node.inputs[0] is None:
        yield "it does not have the five inputs of BatchNormalization"
    if not 0 <= eps < math.inf:
        yield f"its epsilon is {eps:g}, not a number from 0 on"
    held = [tensor_of(value) for value in node.inputs[1:]]
    for kind in (dtype, *(tensor.dtype for tensor in held if tensor is not None)):
        if kind is not None and kind not in _FLOATS:
            yield f"it is of type {kind.name}; {', '.join(known.name for known in _FLOATS)} are normalized"
    if rank is not None and rank not in _ANY_RANK:
        yield f"its input has {rank} dimensions; (N, C) to (N, C, D, H, W) are normalized"
    shapes = {tuple(value.shape) for value in given if value is not None}
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        yield "its parameters are not vectors of one length"


def _known(sizes: tuple[int | None, ...], channels: int) -> Iterator[tuple[int, ...]]:
    """Yield a shape if all of its spatial sizes are known; an unknown batch counts as 1."""
    if len(sizes) < 2 or None in sizes[2:]:
        return
    yield (sizes[0] or 1, channels, *(size for size in sizes[2:] if size is not None))
