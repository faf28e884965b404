"""ONNX graphs run by onnxruntime on torch's tensors, whole or from one value inside to another."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from normsearch.errors import ModelError
from normsearch.forward import try_call

#: What onnxruntime puts before a message.
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
#: Errors are raised; written to stderr as well, they would be said twice.
_FATAL_ONLY = 4


class Runtime(nn.Module):
    """An ONNX model as a module without parameters: tensors in, tensors out by name, on the CPU.

    Args:
        model: the model.
        outputs: names of values of the main graph to return instead of its outputs.
        inputs: names of values of the main graph to give instead of its inputs, each with its type.

    Raises:
        ModelError: onnxruntime cannot run the model.

    """

    def __init__(
        self,
        model: ir.Model,
        outputs: Sequence[str] | None = None,
        inputs: Mapping[str, ir.DataType] | None = None,
    ) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _FATAL_ONLY
        proto = ir.to_proto(model)
        if outputs is not None:
            _cut(proto.graph, outputs, inputs or {})
        constants = {tensor.name for tensor in proto.graph.initializer}
        _drop_repeated_names(proto.graph)
        data = proto.SerializeToString()
        # The session makes copies of its own.
        del proto
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run the model: {_first_line(error)}") from error
        self.inputs = [one.name for one in self._session.get_inputs() if one.name not in constants]
        self._outputs = [one.name for one in self._session.get_outputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the graph on inputs in its own order or by name; outputs that are no tensors are left out."""
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        if len(args) > len(self.inputs) or set(given) != set(self.inputs):
            raise ModelError(
                f"the ONNX graph takes {self._taken()}; got {len(args)} in order and "
                f"{', '.join(kwargs) or 'none'} by name"
            )
        other = next((value for value in given.values() if not isinstance(value, Tensor)), None)
        if other is not None:
            raise ModelError(
                f"an input is of type {type(other).__name__}; give tensors of torch (torch.from_numpy), a "
                "tuple of them in the order of the graph's inputs, or a dict by name"
            )
        feeds = {name: value.detach().cpu().numpy() for name, value in given.items()}
        try:
            found = self._session.run(self._outputs, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in feeds.items())
            raise ModelError(
                f"the ONNX graph failed on the given inputs, {shapes}; it takes {self._taken()}, where a "
                f"number is a size that is fixed ({_first_line(error)})"
            ) from error
        return {
            name: torch.from_numpy(np.ascontiguousarray(value))
            for name, value in zip(self._outputs, found, strict=True)
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        }

    def _taken(self) -> str:
        """Return the names, types and shapes of the inputs."""
        known = {one.name: one for one in self._session.get_inputs()}
        return ", ".join(
            f"{name} {known[name].type.removeprefix('tensor(').removesuffix(')')} "
            f"({', '.join(str(size) for size in known[name].shape)})"
            for name in self.inputs
        )


def stand_in(model: ir.Model) -> nn.Module:
    """Return a module with one parameter, without numbers, of the type that a model's inputs have."""
    kinds = {"DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
    names = [value.dtype.name for value in model.graph.inputs if value.dtype is not None]
    made = nn.Module()
    dtype = next((kinds[name] for name in names if name in kinds), torch.float32)
    made.register_parameter("typed", nn.Parameter(torch.empty(0, dtype=dtype)))
    return made


def batch_size(model: ir.Model) -> int | None:
    """Return the only batch size that a model's inputs leave; None where it is open."""
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    sizes = {value.shape[0] for value in inputs if value.shape}
    only = sizes.pop() if len(sizes) == 1 else None
    # Some exporters write 0 and -1 for a size that is open.
    return only if isinstance(only, int) and only > 0 else None


def _drop_repeated_names(graph: onnx.GraphProto) -> None:
    """Take names from nodes that share one, which ONNX allows and onnxruntime does not."""
    seen: set[str] = set()
    for node in graph.node:
        if node.name in seen:
            node.name = ""
        seen.add(node.name)


def _cut(graph: onnx.GraphProto, outputs: Sequence[str], inputs: Mapping[str, ir.DataType]) -> None:
    """Leave what leads from ``inputs``, or the graph's own, to ``outputs``."""
    makers = {name: node for node in graph.node for name in node.output if name}
    needed, queue = set(), [name for name in outputs if name not in inputs]
    while queue:
        name = queue.pop()
        if name in needed or name in inputs:
            continue
        needed.add(name)
        if name in makers:
            queue += _read(makers[name])
    kept = [node for node in graph.node if any(name in needed for name in node.output)]
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    initialized = {tensor.name for tensor in graph.initializer}
    # Without inputs of one's own, those of the graph are given, needed or not.
    given = [
        value for value in graph.input if value.name in needed or not (inputs or value.name in initialized)
    ]
    for field, values in ((graph.node, kept), (graph.initializer, constants), (graph.input, given)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    new = [onnx.helper.make_tensor_value_info(name, kind.value, None) for name, kind in inputs.items()]
    del graph.output[:], graph.value_info[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    graph.input.extend(new)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads; of subgraphs every name, their own among them."""
    yield from node.input
    for attribute in node.attribute:
        graphs: Collection[onnx.GraphProto] = [*attribute.graphs]
        if attribute.HasField("g"):
            graphs = [attribute.g, *graphs]
        for graph in graphs:
            for inner in graph.node:
                yield from _read(inner)
            yield from (output.name for output in graph.output)


def _first_line(error: Exception) -> str:
    lines = _CODE.sub("", str(error).strip()).splitlines()
    return lines[0][:500] if lines else type(error).__name__


def observed(model: ir.Model, inputs: Any, values: Mapping[str, ir.Value]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that values of the main graph have in one forward pass.

    Args:
        model: the model.
        inputs: one forward pass's inputs.
        values: by whatever they are called by.

    Raises:
        ModelError: onnxruntime cannot run the model, or it fails on ``inputs``.

    """
    names = list(dict.fromkeys(value.name or "" for value in values.values()))
    if not names:
        return {}
    found = try_call(Runtime(model, names), inputs)
    return {key: tuple(found[value.name].shape) for key, value in values.items() if value.name in found}
