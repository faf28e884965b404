"""Hostile ONNX files, built here: each would read the canary, fill the memory or break the reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

#: From the name of a file with a secret to the bytes of a file that is to be refused, and part of why.
Attack = tuple[Callable[[str], bytes], str]

EXTERNAL = "keeps numbers in another file"
SIZES = [4]


def tensor(name: str = "w", count: int = 4) -> TensorProto:
    return onnx.numpy_helper.from_array(np.ones(count, np.float32), name)


def external(canary: str, name: str = "w", *, located: bool = True) -> TensorProto:
    """A tensor whose numbers are in the canary."""
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=SIZES)
    if located:
        made.data_location = TensorProto.EXTERNAL
    for key, text in (("location", canary), ("offset", "0"), ("length", "16")):
        made.external_data.add(key=key, value=text)
    return made


def graph(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = (), name: str = "g") -> Any:
    x, y = (helper.make_tensor_value_info(key, TensorProto.FLOAT, SIZES) for key in ("x", "y"))
    return helper.make_graph(
        list(nodes) or [helper.make_node("Add", ["x", "w"], ["y"])], name, [x], [y], initializers
    )


def model(made: Any = None, **fields: Any) -> onnx.ModelProto:
    made = graph(initializers=(tensor(),)) if made is None else made
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **fields)


def data(made: Any) -> bytes:
    return bytes((made if isinstance(made, onnx.ModelProto) else model(made)).SerializeToString())


def with_tensor(made: TensorProto) -> bytes:
    return data(graph(initializers=(made,)))


def changed(change: Callable[[TensorProto], Any]) -> bytes:
    """A model whose initializer was changed."""
    made = tensor()
    change(made)
    return with_tensor(made)


def branch(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, SIZES)
    return helper.make_graph(list(nodes), "branch", [], [output], initializers)


def conditional(then: onnx.GraphProto) -> Any:
    other = branch(helper.make_node("Identity", ["x"], ["z"]))
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    return graph(node, initializers=(condition,))


def nested(depth: int) -> Any:
    inner = branch(helper.make_node("Identity", ["x"], ["z"]))
    for _ in range(depth):
        inner = branch(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
        # Both branches would double at each level.
        del inner.node[0].attribute[1:]
    return conditional(inner)


def sparse(canary: str) -> onnx.SparseTensorProto:
    values = external(canary, "values")
    indices = onnx.numpy_helper.from_array(np.arange(4), "indices")
    return helper.make_sparse_tensor(values, indices, [2**40])


def wire(number: int, payload: bytes, kind: int = 2) -> bytes:
    """One field as bytes."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
        return out + bytes([value])

    return varint(number << 3 | kind) + (varint(len(payload)) if kind == 2 else b"") + payload


def types(depth: int) -> Any:
    made = graph(initializers=(tensor(),))
    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    for _ in range(depth):
        inner = helper.make_sequence_type_proto(inner)
    made.value_info.append(helper.make_value_info("deep", inner))
    return made


def named(text: str) -> bytes:
    return data(graph(helper.make_node("Relu", ["x"], ["y"], name=text)))


def with_function(domain: str, op: str) -> bytes:
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function(
        domain, op, ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], imports
    )
    made = model(graph(helper.make_node(op, ["x"], ["y"], domain=domain)), functions=[function])
    if domain:
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return data(made)


def function_with_external(canary: str) -> bytes:
    node = helper.make_node("Constant", [], ["b"], value=external(canary))
    function = helper.make_function("local", "f", ["a"], ["b"], [node], [helper.make_opsetid("", 17)])
    return data(model(functions=[function]))


def training(canary: str) -> bytes:
    made = model()
    made.training_info.add().initialization.CopyFrom(graph(initializers=(external(canary),)))
    return data(made)


def annotated(canary: str) -> bytes:
    made = model()
    made.graph.sparse_initializer.append(sparse(canary))
    return data(made)


def raw_and_typed(made: TensorProto) -> None:
    made.float_data.extend([1.0] * 4)


def set_dims(*dims: int) -> Callable[[TensorProto], None]:
    def change(made: TensorProto) -> None:
        del made.dims[:]
        made.dims.extend(dims)

    return change


def set_type(number: int) -> Callable[[TensorProto], None]:
    return lambda made: setattr(made, "data_type", number)


def text_tensor(_: str) -> bytes:
    return with_tensor(TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"x"]))


GOOD = data(model())

ATTACKS: dict[str, Attack] = {
    "external initializer": (lambda c: with_tensor(external(c)), EXTERNAL),
    "external without a location": (lambda c: with_tensor(external(c, located=False)), EXTERNAL),
    "location without external data": (
        lambda c: changed(lambda t: setattr(t, "data_location", TensorProto.EXTERNAL)),
        EXTERNAL,
    ),
    "external in a subgraph": (
        lambda c: data(
            conditional(branch(helper.make_node("Add", ["x", "v"], ["z"]), initializers=(external(c, "v"),)))
        ),
        EXTERNAL,
    ),
    "external Constant": (
        lambda c: data(
            graph(
                helper.make_node("Constant", [], ["w"], value=external(c)),
                helper.make_node("Add", ["x", "w"], ["y"]),
            )
        ),
        EXTERNAL,
    ),
    "external Constant in a subgraph": (
        lambda c: data(conditional(branch(helper.make_node("Constant", [], ["z"], value=external(c))))),
        EXTERNAL,
    ),
    "external in a list of tensors": (
        lambda c: data(graph(helper.make_node("Relu", ["x"], ["y"], extra=[external(c), external(c)]))),
        EXTERNAL,
    ),
    "external sparse initializer": (annotated, "sparse tensor"),
    "external sparse Constant": (
        lambda c: data(graph(helper.make_node("Constant", [], ["w"], sparse_value=sparse(c)))),
        "sparse tensor",
    ),
    "external in a function": (function_with_external, "defines functions"),
    "external in training info": (training, "graphs for training"),
    "unknown domain": (
        lambda c: data(graph(helper.make_node("Relu", ["x"], ["y"], domain="evil"))),
        "the operator 'evil::Relu'",
    ),
    "Microsoft's domain": (
        lambda c: data(graph(helper.make_node("Inverse", ["x"], ["y"], domain="com.microsoft"))),
        "com.microsoft",
    ),
    "unknown operator": (
        lambda c: data(graph(helper.make_node("Exec", ["x"], ["y"]))),
        "the operator 'Exec'",
    ),
    "image decoder": (
        lambda c: data(graph(helper.make_node("ImageDecoder", ["x"], ["y"]))),
        "the operator 'ImageDecoder'",
    ),
    "unknown operator in a subgraph": (
        lambda c: data(conditional(branch(helper.make_node("Exec", ["x"], ["z"])))),
        "the operator 'Exec'",
    ),
    "function with an operator's name": (lambda c: with_function("", "Relu"), "defines functions"),
    "function of its own domain": (lambda c: with_function("local", "f"), "defines functions"),
    "attribute of a function": (
        lambda c: GOOD + wire(7, wire(1, wire(4, b"Relu") + wire(5, wire(1, b"a") + wire(21, b"b")))),
        "two of",
    ),
    "gigantic shape": (
        lambda c: changed(set_dims(2**40, 2**20)),
        "which is 1,152,921,504,606,846,976 numbers",
    ),
    "overflowing shape": (lambda c: changed(set_dims(2**62, 4)), "numbers, where 4 are"),
    "negative size": (lambda c: changed(set_dims(-4, -1)), "tensor of shape (-4, -1)"),
    "many dimensions": (lambda c: changed(set_dims(*[1] * 100)), "100 dimensions"),
    "too few numbers": (lambda c: changed(set_dims(5)), "which is 5 numbers, where 4 are"),
    "too many numbers": (lambda c: changed(set_dims(3)), "which is 3 numbers, where 4 are"),
    "half a number": (lambda c: changed(lambda t: setattr(t, "raw_data", t.raw_data[:-1])), "where 3 are"),
    "numbers in two places": (lambda c: changed(raw_and_typed), "where 8 are"),
    "numbers of another type": (lambda c: changed(set_type(TensorProto.INT64)), "where 2 are"),
    "no type": (lambda c: changed(set_type(0)), "type UNDEFINED"),
    "type of the future": (lambda c: changed(set_type(99)), "type 99"),
    "text": (text_tensor, "tensor of text"),
    "deep graphs": (lambda c: data(nested(30)), "deep"),
    "very deep types": (lambda c: data(types(40)), "nests messages more than"),
    "many empty nodes": (lambda c: wire(7, wire(1, b"") * 1_000_001), "more than 1,000,000 parts"),
    "two graphs": (lambda c: GOOD + wire(7, b""), "has two of ModelProto.graph"),
    "unknown field": (lambda c: GOOD + wire(4000, b"x"), "a field 4000 in ModelProto, which is not known"),
    "field of another wire type": (
        lambda c: GOOD + wire(2, b"\x01", 0),
        "ModelProto.producer_name of the wrong",
    ),
    "group": (lambda c: GOOD + b"\x0b\x0c", "wire type 3"),
    "endless number": (lambda c: GOOD + b"\x08" + b"\xff" * 11, "more than 64 bits"),
    "length beyond the end": (lambda c: GOOD + b"\x12\xff\xff\xff\xff\x0f", "truncated"),
    "no text": (lambda c: GOOD[:0] + wire(2, b"\xff\xfe") + GOOD, "is no text"),
    "control characters": (lambda c: named("a\x1b[2Jb"), "which is no name"),
    "right to left": (lambda c: named("a\u202eb"), "which is no name"),
    "line break": (lambda c: named("a\nb"), "which is no name"),
    "zero byte": (lambda c: named("a\0b"), "which is no name"),
    "long name": (lambda c: named("a" * 1001), "which is no name"),
    "no graph": (lambda c: wire(1, b"\x08", 0), "it has no graph"),
    "no opset": (
        lambda c: data(onnx.ModelProto(ir_version=8, graph=graph(initializers=(tensor(),)))),
        "does not import",
    ),
    "two initializers of one name": (
        lambda c: data(graph(initializers=(tensor(), tensor()))),
        "two initializers",
    ),
    "a cycle": (
        lambda c: data(graph(helper.make_node("Relu", ["b"], ["y"]), helper.make_node("Relu", ["y"], ["b"]))),
        "no valid ONNX model",
    ),
    "a pickle": (lambda c: b"\x80\x02cos\nsystem\n.", ""),
    "a zip": (lambda c: b"PK\x03\x04" + b"\0" * 40, ""),
}
