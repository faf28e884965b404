"""What stands around a site in an ONNX graph: the weight that feeds it, the activation that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from normsearch.activations import Activation
from normsearch.dataflow import Producer
from normsearch.onnx_graph.graphs import DOMAINS, is_read_once, sizes_of, tensor_of

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTION_RANKS = (3, 4, 5)
#: Operators that are the same function as a module, by whose name methods know it.
_ACTIVATIONS = {
    "Relu": "torch.nn.modules.activation.ReLU",
    "HardSwish": "torch.nn.modules.activation.Hardswish",
    "Gelu": "torch.nn.modules.activation.GELU",
    "LeakyRelu": "torch.nn.modules.activation.LeakyReLU",
    "PRelu": "torch.nn.modules.activation.PReLU",
    "Elu": "torch.nn.modules.activation.ELU",
    "Selu": "torch.nn.modules.activation.SELU",
    "Celu": "torch.nn.modules.activation.CELU",
    "Mish": "torch.nn.modules.activation.Mish",
    "Sigmoid": "torch.nn.modules.activation.Sigmoid",
    "HardSigmoid": "torch.nn.modules.activation.Hardsigmoid",
    "Tanh": "torch.nn.modules.activation.Tanh",
    "Softplus": "torch.nn.modules.activation.Softplus",
}


def node_path(node: ir.Node) -> str:
    """Return how a node is called: by its name, or by its first output's."""
    return node.name or node.outputs[0].name or ""


def find_activation(node: ir.Node) -> Activation | None:
    """Return the activation that reads a node's output; one that may be taken out if nothing else does."""
    output = node.outputs[0]
    for reader in (user for user, _ in output.uses()):
        layer = _ACTIVATIONS.get(reader.op_type) if reader.domain in DOMAINS else None
        if layer is None:
            continue
        detail = None
        if not is_read_once(output):
            detail = "what it reads is read elsewhere too"
        elif reader.graph is not node.graph:
            detail = "it stands in a subgraph"
        elif reader.op_type == "Gelu" and "approximate" in reader.attributes:
            detail = "it is an approximation"
        return Activation(path=node_path(reader), layer=layer, removable=detail is None, detail=detail)
    return None


def find_producer(node: ir.Node, rank: int | None, channels: int | None) -> Producer | None:
    """Return the nearest convolution or linear node upstream of a site.

    Args:
        node: the site's node.
        rank: of its input; None where it is not known.
        channels: of its input; None where the site cannot be rewritten.

    """
    for feed in _weighted_before(node):
        detail = _distance(feed, node) or _obstacle(feed, rank, channels)
        return Producer(
            path=node_path(feed),
            layer=f"onnx.{feed.op_type}",
            foldable=detail is None,
            detail=detail,
            source="trace",
            groups=whole(feed, "group", 1),
            transposed=feed.op_type == "ConvTranspose",
            plain=_weight(feed) is not None,
        )
    return None


def feed_of(node: ir.Node) -> ir.Node | None:
    """Return the node that feeds a site."""
    source = node.inputs[0]
    return None if source is None else source.producer()


def _weighted_before(node: ir.Node) -> Iterator[ir.Node]:
    """Walk upstream breadth first and yield weighted nodes, those with a constant weight alone after that."""
    queue, seen, passed = [feed_of(node)], set(), []
    while queue:
        here = queue.pop(0)
        if here is None or here in seen:
            continue
        seen.add(here)
        if here.op_type in WEIGHTED and here.domain in DOMAINS:
            if _weight(here) is not None:
                yield here
                continue
            passed.append(here)
        queue += [None if value is None else value.producer() for value in here.inputs]
    yield from passed


def _distance(feed: ir.Node, node: ir.Node) -> str | None:
    if feed_of(node) is not feed:
        return "other operations lie between it and the site"
    if feed.graph is not node.graph:
        return "it stands outside the site's subgraph"
    return None if is_read_once(feed.outputs[0]) else "its output is read elsewhere too"


def _obstacle(feed: ir.Node, rank: int | None, channels: int | None) -> str | None:
    weight = _weight(feed)
    if weight is None:
        return "its weight is computed in the graph"
    if feed.op_type in ("Gemm", "MatMul"):
        if len(weight.shape) != 2:
            return "its weight is no matrix"
        # (N, L, F) would be read with L as its channels.
        if rank != 2:
            return "whether its features are the site's channels is not known: the input's rank is not 2"
    elif len(weight.shape) not in _CONVOLUTION_RANKS:
        return f"its weight has {len(weight.shape)} dimensions"
    groups, sizes = whole(feed, "group", 1), sizes_of(weight)
    if groups < 1 or sizes[0] % groups or out_channels(feed, sizes) != channels:
        return "its channels are not the site's"
    bias = bias_input(feed)
    if bias is None:
        return None
    value = tensor_of(bias)
    if value is None:
        return "its bias is computed in the graph"
    sizes = sizes_of(value)
    if sizes and (
        sizes[-1] != math.prod(sizes) or sizes[-1] not in (1, out_channels(feed, sizes_of(weight)))
    ):
        return "its bias is no vector"
    return None


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    return tensor_of(node.inputs[1]) if len(node.inputs) > 1 else None


def bias_input(node: ir.Node) -> ir.Value | None:
    """Return where a weighted node's bias comes from."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def whole(node: ir.Node, name: str, default: int) -> int:
    """Return an attribute that is a whole number."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_int()


def out_channels(node: ir.Node, shape: Sequence[int]) -> int:
    """Return the number of channels that a weight of this shape puts out."""
    if node.op_type == "ConvTranspose":
        return int(shape[1]) * whole(node, "group", 1)
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not whole(node, "transB", 0)):
        return int(shape[-1])
    return int(shape[0])
