"""The scale and shift per channel that end a rewritten site, found in the graph and changed."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor

from normsearch.onnx_graph.graphs import constant, sizes_of, tensor_of

_NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization")
#: What only moves numbers or changes their type.
_MOVES = ("Transpose", "Reshape", "Cast")
_SCALE, _BIAS = 1, 2


class Affine(NamedTuple):
    """The two constants of a site's affine: which node reads them, and as which input."""

    scale: tuple[ir.Node, int]
    bias: tuple[ir.Node, int]

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Return γ and β of shape (C,), double precision."""
        scale, bias = (constant(node.inputs[index]) for node, index in self)
        assert scale is not None
        assert bias is not None
        return scale.flatten(), bias.flatten()

    def set(self, scale: Tensor, bias: Tensor) -> None:
        """Change γ and β."""
        for (node, index), numbers in zip(self, (scale, bias), strict=True):
            old = node.inputs[index]
            tensor = tensor_of(old)
            assert old is not None
            assert tensor is not None
            array = numbers.reshape(sizes_of(tensor)).numpy().astype(tensor.dtype.numpy())
            _write(old, ir.tensor(array, name=old.name))


def _write(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes["value"] = ir.AttrTensor("value", tensor)


def affine_of(output: ir.Value, channels: int) -> Affine | None:
    """Return the affine that ends what puts out ``output``; None where there is none to change."""
    node = output.producer()
    while node is not None and node.op_type in _MOVES:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None:
        return None
    if node.op_type in _NORMS:
        return _checked(Affine((node, _SCALE), (node, _BIAS)), channels)
    if node.op_type != "Add" or node.inputs[0] is None:
        return None
    before = node.inputs[0].producer()
    if before is None or before.op_type != "Mul":
        return None
    return _checked(Affine((before, 1), (node, 1)), channels)


def _checked(affine: Affine, channels: int) -> Affine | None:
    for node, index in affine:
        value = node.inputs[index] if len(node.inputs) > index else None
        tensor = tensor_of(value)
        # A constant with other readers, or one of the graph's own inputs, is not the site's alone.
        if value is None or tensor is None or tensor.size != channels or len(value.uses()) != 1:
            return None
        maker = value.producer()
        if maker is not None and maker.op_type != "Constant":
            return None
        if value.is_graph_input():
            return None
    return affine


@torch.no_grad()
def multiply(affine: Affine, scale: Tensor, shift: Tensor) -> None:
    """Let an affine's output y become scale·y + shift."""
    gamma, beta = affine.numbers()
    affine.set(scale * gamma, scale * beta + shift)
