"""What is read from an ONNX graph before anything is changed: constants, names, inferred shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from normsearch.errors import ModelError

#: The opset from which BatchNormalization means what it means today.
LEAST_OPSET = 9
#: The names that ONNX's own operators go by.
DOMAINS = ("", "ai.onnx")

#: ``None`` stands for a size that is not known before the model runs.
Sizes = tuple[int | None, ...]


@dataclass(frozen=True)
class Shapes:
    """Types and shapes of values by name, as far as they were declared or inferred."""

    sizes: dict[str, Sizes] = field(default_factory=dict)
    dtypes: dict[str, ir.DataType] = field(default_factory=dict)


def opset(model: ir.Model) -> int:
    """Return the version of ONNX's own operators that a model was written for.

    Raises:
        ModelError: older than BatchNormalization as it is today, or newer than the installed onnx.

    """
    versions = [model.opset_imports[domain] for domain in DOMAINS if domain in model.opset_imports]
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1:
        raise ModelError("the model imports no version of ONNX's own operators; export it again")
    if not LEAST_OPSET <= versions[0] <= newest:
        raise ModelError(
            f"the model is written for opset {versions[0]}; {LEAST_OPSET} to {newest} are rewritten: convert "
            "it with onnx.version_converter, or export it again"
        )
    return versions[0]


def constant(value: ir.Value | None) -> Tensor | None:
    """Return the numbers of a constant in double precision; None of anything else, and of text."""
    found = tensor_of(value)
    return None if found is None else as_torch(found.numpy())


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return what an initializer or a Constant node holds, past Identity nodes; None of anything else.

    An initializer that is also listed as an input, as in files before IR version 4, counts as a constant.
    """
    while value is not None:
        node = value.producer()
        if node is None or node.op_type != "Identity" or node.domain not in DOMAINS:
            break
        value = node.inputs[0]
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in DOMAINS:
        return None
    # Checkers let a Constant without a value pass, and one of text.
    with suppress(ValueError):
        return ir.convenience.get_const_tensor(value)
    return None


def sizes_of(tensor: ir.TensorProtocol) -> list[int]:
    """Return the shape of a tensor, which is known."""
    return [int(size) for size in tensor.shape.numpy()]


def as_torch(array: np.ndarray) -> Tensor | None:
    """Return numbers as a double tensor; None of text and what torch has no type for."""
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        return None
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.array(array, dtype=np.float64))


def names(model: ir.Model) -> set[str]:
    """Return every name of a node or value, in subgraphs too."""
    found: set[str] = set()
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            found.add(value.name or "")
        for node in graph:
            found.add(node.name or "")
            found |= {value.name or "" for value in node.outputs}
    return found


def infer(model: ir.Model) -> Shapes:
    """Return declared and inferred shapes of every value; the model is left as it is.

    Where inference fails, as on a graph that contradicts itself, what was declared is all there is.
    """
    proto = _outline(model)
    with suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        proto = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    shapes = Shapes()
    for graph in graphs_of(proto.graph):
        for info in (*graph.input, *graph.value_info, *graph.output):
            tensor = info.type.tensor_type
            if not info.type.HasField("tensor_type"):
                continue
            if tensor.elem_type:
                shapes.dtypes[info.name] = ir.DataType(tensor.elem_type)
            if tensor.HasField("shape"):
                shapes.sizes[info.name] = tuple(_size(dimension) for dimension in tensor.shape.dim)
        for tensor in graph.initializer:
            shapes.dtypes[tensor.name] = ir.DataType(tensor.data_type)
            shapes.sizes[tensor.name] = tuple(tensor.dims)
    return shapes


def _size(dimension: onnx.TensorShapeProto.Dimension) -> int | None:
    # Exporters write 0 and -1 for a size that is not known, too.
    return dimension.dim_value if dimension.dim_value > 0 else None


#: Initializers up to so many bytes may hold a shape; larger ones only have one.
_MAY_BE_A_SHAPE = 1000


def _outline(model: ir.Model) -> onnx.ModelProto:
    """Return a model without the numbers of its weights, which inference does not read, only copies."""
    outline = model.clone()
    for graph in outline.graphs():
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _MAY_BE_A_SHAPE:
                continue
            # An input in the initializer's place has its type and shape. Subgraphs have none of their own.
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(sizes_of(tensor))
            if graph is outline.graph:
                del graph.initializers[name]
                value.const_value = None
                if value not in graph.inputs:
                    graph.inputs.append(value)
    return ir.to_proto(outline)


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ((attribute.g,) if attribute.HasField("g") else ()) + tuple(attribute.graphs):
                yield from graphs_of(inner)


def is_read_once(value: ir.Value) -> bool:
    """Tell whether one node reads a value and nothing else does, no output of a graph either."""
    return len(value.uses()) == 1 and not value.is_graph_output()
