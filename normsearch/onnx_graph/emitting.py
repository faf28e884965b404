"""New nodes for an ONNX graph: one operator at a time, in the form that the graph's opset has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

#: From here on the axes of a reduction are an input, not an attribute.
_AXES_AS_INPUT = 18
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Emitter:
    """Makes the nodes that take a site's place.

    Args:
        path: the site's; the first part of every new name.
        opset: of the graph.
        dtype: of the site's input.
        rank: of the site's input.
        taken: names that are in use; new ones are added.
        domain: by which the graph calls ONNX's own operators.

    Attributes:
        nodes: what was made, in order.
        initializers: the new constants.

    """

    def __init__(
        self, path: str, opset: int, dtype: ir.DataType, rank: int, taken: set[str], domain: str
    ) -> None:
        self.path, self.opset, self.dtype, self.rank, self.domain = path, opset, dtype, rank, domain
        self._taken = taken
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    @property
    def is_half(self) -> bool:
        """Whether the input has fewer digits than statistics are computed with."""
        return self.dtype in _HALVES

    @property
    def spatial(self) -> list[int]:
        """The axes of space."""
        return list(range(2, self.rank))

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Make a node of one operator and return its output."""
        node = ir.node(kind, list(inputs), attributes or None, domain=self.domain, name=self.name(kind))
        node.outputs[0].name = self.name(f"{kind}_output")
        self.nodes.append(node)
        return node.outputs[0]

    def per_channel(self, name: str, values: Tensor) -> ir.Value:
        """Make a constant of one number per channel, in a shape that broadcasts to the input."""
        return self.constant(name, values.reshape(1, -1, *(1 for _ in self.spatial)))

    def constant(self, name: str, values: Tensor, dtype: ir.DataType | None = None) -> ir.Value:
        """Make a constant of the input's type."""
        wanted = self.dtype if dtype is None else dtype
        with np.errstate(over="ignore", invalid="ignore"):
            array = values.detach().cpu().numpy().astype(wanted.numpy())
        return self._initializer(name, array)

    def whole(self, name: str, values: Sequence[int]) -> ir.Value:
        """Make a constant of whole numbers."""
        return self._initializer(name, np.array(values, dtype=np.int64))

    def mean(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Average over axes, which stay with size one."""
        if self.opset >= _AXES_AS_INPUT:
            return self.op("ReduceMean", x, self.whole("axes", axes), keepdims=1)
        return self.op("ReduceMean", x, axes=list(axes), keepdims=1)

    def inverse_deviation(self, variance: ir.Value, eps: float) -> ir.Value:
        """Return 1 / √(variance + eps)."""
        return self.op("Reciprocal", self.op("Sqrt", self.op("Add", variance, self.scalar("epsilon", eps))))

    def scalar(self, name: str, value: float) -> ir.Value:
        """Make a constant of one number."""
        return self._initializer(name, np.array(value).astype(self.dtype.numpy()))

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        full = self.name(name)
        tensor = ir.tensor(array, name=full)
        value = ir.Value(
            name=full, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers.append(value)
        return value

    def name(self, what: str) -> str:
        """Return a new name, and take it."""
        name, number = f"{self.path}.{what}", 1
        while name in self._taken:
            number += 1
            name = f"{self.path}.{what}_{number}"
        self._taken.add(name)
        return name
