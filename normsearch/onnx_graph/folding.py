"""A weighted node as torch's layer, so that methods may fold into it, and back."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from normsearch.onnx_graph.editing import drop_dead, insert
from normsearch.onnx_graph.emitting import Emitter
from normsearch.onnx_graph.graphs import constant
from normsearch.onnx_graph.neighbours import bias_input, out_channels, whole

_CONVOLUTIONS: dict[tuple[str, int], type[nn.Module]] = {
    ("Conv", 3): nn.Conv1d,
    ("Conv", 4): nn.Conv2d,
    ("Conv", 5): nn.Conv3d,
    ("ConvTranspose", 3): nn.ConvTranspose1d,
    ("ConvTranspose", 4): nn.ConvTranspose2d,
    ("ConvTranspose", 5): nn.ConvTranspose3d,
}


@torch.no_grad()
def as_module(node: ir.Node) -> nn.Module:
    """Return a foldable producer as torch's own layer, in double precision.

    A Gemm's alpha and beta are multiplied into the weight and the bias.
    """
    weight, bias = constant(node.inputs[1]), constant(bias_input(node))
    assert weight is not None
    count = out_channels(node, weight.shape)
    if bias is not None:
        bias = bias.reshape(-1).expand(count).clone()
    kwargs: dict[str, Any] = {"bias": bias is not None, "dtype": torch.float64, "device": "meta"}
    if node.op_type in ("Gemm", "MatMul"):
        transposed = node.op_type == "Gemm" and whole(node, "transB", 0)
        matrix = weight if transposed else weight.t()
        if node.op_type == "Gemm":
            matrix = matrix * _float(node, "alpha")
            bias = None if bias is None else bias * _float(node, "beta")
        layer: nn.Module = nn.Linear(matrix.shape[1], matrix.shape[0], **kwargs)
        weight = matrix
    else:
        groups, kernel = whole(node, "group", 1), tuple(weight.shape[2:])
        transposed = node.op_type == "ConvTranspose"
        sizes = (weight.shape[0] if transposed else weight.shape[1] * groups, count)
        layer = _CONVOLUTIONS[node.op_type, weight.dim()](*sizes, kernel, groups=groups, **kwargs)
    layer.register_parameter("weight", nn.Parameter(weight.contiguous()))
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias))
    return layer


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None or attribute.is_ref() else attribute.as_float()


def write_producer(model: ir.Model, e: Emitter, feed: ir.Node, producer: nn.Module) -> None:
    """Give a node the weight and bias of a layer; a MatMul's bias becomes an Add that its readers read.

    Args:
        model: that the node stands in.
        e: names the new constants; what it has made so far is put into the graph.
        feed: the node.
        producer: the layer.

    """
    weight, bias, old = producer.weight, producer.bias, feed.inputs[1:]
    assert isinstance(weight, Tensor)
    if feed.op_type == "MatMul" or (feed.op_type == "Gemm" and not whole(feed, "transB", 0)):
        weight = weight.t()
    feed.replace_input_with(1, e.constant("weight", weight))
    # A Gemm's are part of the weight and the bias now.
    for name in ("alpha", "beta"):
        feed.attributes.pop(name, None)
    if isinstance(bias, Tensor):
        value = e.constant("bias", bias)
        if feed.op_type == "MatMul":
            _add_bias(e, feed.outputs[0], value)
        else:
            feed.resize_inputs(3)
            feed.replace_input_with(2, value)
    insert(model, feed, e)
    for source in old:
        if source is not None:
            drop_dead(source)


def _add_bias(e: Emitter, product: ir.Value, bias: ir.Value) -> None:
    readers = product.uses()
    total = e.op("Add", product, bias)
    total.type, total.shape = product.type, product.shape
    for reader, index in readers:
        reader.replace_input_with(index, total)
