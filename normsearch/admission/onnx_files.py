"""ONNX files of strangers: one file, ONNX's own operators, as many numbers as shapes say.

Nothing in an ONNX file is code, but a file may name others to be read (external data), functions and
operators that some runtime gives a meaning, and sizes that its numbers do not have. It is checked as bytes,
parsed, checked part by part, and then by ONNX's own checker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from normsearch.admission import protobuf
from normsearch.admission.protobuf import Limits, WireError
from normsearch.errors import CheckpointError

#: What protobuf itself can hold.
MOST_BYTES = 2**31 - 1
MOST_ELEMENTS = 2**31
MOST_DIMENSIONS = 64
#: Graphs inside graphs: bodies of If, Loop and Scan.
DEEPEST_GRAPH = 12
LONGEST_NAME = 1000
#: A graph in an attribute is three messages down.
LIMITS = Limits(depth=4 * DEEPEST_GRAPH + 12, messages=1_000_000, fields=5_000_000)
DOMAINS = ("", "ai.onnx")

_FIELDS = {
    "ModelProto": "ir_version opset_import producer_name producer_version domain model_version doc_string "
    "graph metadata_props",
    "GraphProto": "node name initializer doc_string input output value_info quantization_annotation "
    "metadata_props",
    "NodeProto": "input output name op_type domain attribute doc_string metadata_props",
    "AttributeProto": "name doc_string type f i s t g tp floats ints strings tensors graphs type_protos",
    "TensorProto": "dims data_type float_data int32_data int64_data name doc_string raw_data double_data "
    "uint64_data data_location metadata_props",
    "ValueInfoProto": "name type doc_string metadata_props",
    "TypeProto": "tensor_type sequence_type optional_type denotation",
    "TypeProto.Tensor": "elem_type shape",
    "TypeProto.Sequence": "elem_type",
    "TypeProto.Optional": "elem_type",
    "TensorShapeProto": "dim",
    "TensorShapeProto.Dimension": "dim_value dim_param denotation",
    "OperatorSetIdProto": "domain version",
    "StringStringEntryProto": "key value",
    "TensorAnnotation": "tensor_name quant_parameter_tensor_names",
}
_ALLOWED = {f"onnx.{message}": frozenset(fields.split()) for message, fields in _FIELDS.items()}
_EXTERNAL = (
    "keeps numbers in another file (external data), which is never read; write one file: "
    "onnx.save(onnx.load(path), path) where you trust it"
)
_SPARSE = "has a sparse tensor, whose dense size nothing bounds; write it as a dense one"
_REASONS = {
    "onnx.TensorProto.external_data": _EXTERNAL,
    "onnx.TensorProto.string_data": "has a tensor of text; models of numbers are read",
    "onnx.GraphProto.sparse_initializer": _SPARSE,
    "onnx.AttributeProto.sparse_tensor": _SPARSE,
    "onnx.AttributeProto.sparse_tensors": _SPARSE,
    "onnx.ModelProto.training_info": "has graphs for training; export the model for inference",
    "onnx.ModelProto.functions": (
        "defines functions; inline them first: onnx.inliner.inline_local_functions(model)"
    ),
    "onnx.AttributeProto.ref_attr_name": "refers to an attribute of a function outside of one",
}

#: ONNX's operators on numbers. Not among them: ImageDecoder, which parses images, and those on text.
_NAMES = """
Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
BatchNormalization Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast
CastLike CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress Concat ConcatFromSequence Constant
ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumProd CumSum DFT DeformConv DepthToSpace
DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor
GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity
If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention
Log LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool Mean
MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Multinomial Neg NegativeLogLikelihoodLoss
NonMaxSuppression NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or PRelu Pad Pow
QLinearConv QLinearMatMul QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform
RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding
Round STFT Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty
SequenceErase SequenceInsert SequenceLength SequenceMap Shape Shrink Sigmoid Sign Sin Sinh Size Slice
Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze Sub Sum
SwiGLU Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample
Where Xor
"""
OPERATORS = frozenset(_NAMES.split())

#: Where each type's numbers are when they are not raw, and the bytes of one that is.
_NUMBERS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 4),
    TensorProto.DOUBLE: ("double_data", 8),
    TensorProto.FLOAT16: ("int32_data", 2),
    TensorProto.BFLOAT16: ("int32_data", 2),
    TensorProto.INT8: ("int32_data", 1),
    TensorProto.INT16: ("int32_data", 2),
    TensorProto.INT32: ("int32_data", 4),
    TensorProto.INT64: ("int64_data", 8),
    TensorProto.UINT8: ("int32_data", 1),
    TensorProto.UINT16: ("int32_data", 2),
    TensorProto.UINT32: ("uint64_data", 4),
    TensorProto.UINT64: ("uint64_data", 8),
    TensorProto.BOOL: ("int32_data", 1),
}
_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def read(path: Path) -> onnx.ModelProto:
    """Return the model in an ONNX file; no other file is opened.

    Raises:
        CheckpointError: no regular file, empty, truncated, larger than one file can be, or anything but a
            model of ONNX's own operators whose numbers are all in it.

    """
    return admitted(_bytes(path), path)


def admitted(data: bytes, path: Path) -> onnx.ModelProto:
    """Return the model in these bytes, which ``path`` names in errors.

    Raises:
        CheckpointError: as for ``read``.

    """
    try:
        protobuf.check(data, onnx.ModelProto.DESCRIPTOR, _ALLOWED, _REASONS, LIMITS)
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
        _check_model(model)
    except WireError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is no valid ONNX file ({_said(error)}); export it again") from error
    try:
        onnx.checker.check_model(data)
    except Exception as error:
        raise CheckpointError(f"{path} is no valid ONNX model: {_said(error)}; export it again") from error
    return model


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _bytes(path: Path) -> bytes:
    from normsearch.admission import first_bytes
    from normsearch.admission.torch_zip import MAGIC

    if first_bytes(path).startswith(MAGIC):
        raise CheckpointError(
            f"{path} is a zip archive, not an ONNX model; rename an exported program to {path.stem}.pt2, "
            f"what torch.save wrote to {path.stem}.pth"
        )
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; an ONNX file has at most {MOST_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error


def _check_model(model: onnx.ModelProto) -> None:
    domains = [entry.domain for entry in model.opset_import]
    if not model.HasField("graph"):
        raise WireError("is no ONNX file: it has no graph")
    if len(set(domains)) != len(domains) or sum(domain in DOMAINS for domain in domains) != 1:
        raise WireError("does not import one version of ONNX's own operators")
    for domain in domains:
        _check_name(domain, "domain")
    _check_graph(model.graph, 0)


def _check_graph(graph: onnx.GraphProto, depth: int) -> None:
    if depth > DEEPEST_GRAPH:
        raise WireError(f"has graphs inside graphs, more than {DEEPEST_GRAPH} deep")
    _check_name(graph.name, "graph")
    for tensor in graph.initializer:
        _check_tensor(tensor)
    names = [tensor.name for tensor in graph.initializer]
    if len(set(names)) != len(names):
        raise WireError("has two initializers of one name")
    for info in (*graph.input, *graph.output, *graph.value_info):
        _check_name(info.name, "value")
        _check_type(info.type)
    for node in graph.node:
        _check_node(node)
        for inner in _graphs(node):
            _check_graph(inner, depth + 1)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_node(node: onnx.NodeProto) -> None:
    if node.domain not in DOMAINS or node.op_type not in OPERATORS:
        what = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise WireError(
            f"has the operator {what[:100]!r}, which is none of ONNX's own on numbers: what it does is not "
            "known"
        )
    for name in (node.name, *node.input, *node.output):
        _check_name(name, "node or value")
    for attribute in node.attribute:
        _check_name(attribute.name, "attribute")
        if attribute.HasField("t"):
            _check_tensor(attribute.t)
        for tensor in attribute.tensors:
            _check_tensor(tensor)
        for type_ in (*attribute.type_protos, *([attribute.tp] if attribute.HasField("tp") else [])):
            _check_type(type_)


def _check_type(type_: onnx.TypeProto) -> None:
    kind = type_.WhichOneof("value")
    while kind in ("sequence_type", "optional_type"):
        type_ = getattr(type_, kind).elem_type
        kind = type_.WhichOneof("value")
    if len(type_.tensor_type.shape.dim) > MOST_DIMENSIONS:
        raise WireError(f"has a value of more than {MOST_DIMENSIONS} dimensions")
    for dimension in type_.tensor_type.shape.dim:
        _check_name(dimension.dim_param, "dimension")


def _check_name(name: str, what: str) -> None:
    if len(name) > LONGEST_NAME or not (name.isprintable() or not name):
        raise WireError(f"has a {what} called {name[:60]!r}, which is no name")


def _check_tensor(tensor: TensorProto) -> None:
    """Raise unless a tensor has as many numbers as its shape says, in one place."""
    _check_name(tensor.name, "tensor")
    if tensor.data_location != TensorProto.DEFAULT:
        raise WireError(_EXTERNAL)
    if tensor.data_type not in _NUMBERS:
        kinds = TensorProto.DataType
        known = tensor.data_type in kinds.values()
        name = kinds.Name(tensor.data_type) if known else str(tensor.data_type)
        raise WireError(f"has a tensor of type {name}, which is not read")
    if len(tensor.dims) > MOST_DIMENSIONS:
        raise WireError(f"has a tensor of {len(tensor.dims)} dimensions")
    field, size = _NUMBERS[tensor.data_type]
    count, shape = protobuf.elements(tensor.dims), tuple(tensor.dims)
    lengths = {name: len(getattr(tensor, name)) for name in _DATA}
    raw = tensor.HasField("raw_data")
    others = sum(length for name, length in lengths.items() if raw or name != field)
    held = len(tensor.raw_data) // size if raw else lengths[field]
    if count > MOST_ELEMENTS or others or held != count or (raw and len(tensor.raw_data) % size):
        raise WireError(
            f"has a tensor of shape {shape}, which is {count:,} numbers, where {held + others:,} are"
        )
