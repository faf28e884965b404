"""ONNX models in and out: files that are read as bytes of strangers, models of onnx-ir as they are."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from normsearch.admission.onnx_files import MOST_BYTES, read
from normsearch.errors import CheckpointError, ModelError
from normsearch.files import write_atomically
from normsearch.onnx_graph.graphs import graphs_of

#: What a model may be given as.
Source = ir.Model | str | os.PathLike[str]

SUFFIX = ".onnx"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file; nothing beside it is read and nothing in it is executed.

    Args:
        path: the file.

    Raises:
        CheckpointError: not an ONNX file, or one with external data, functions, operators that are not
            ONNX's own, or contents that contradict each other.

    """
    path = Path(path)
    return deserialized(read(path), path)


def deserialized(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """Return an admitted file's model as onnx-ir has it.

    Raises:
        CheckpointError: onnx-ir finds contradictions that ONNX's checker does not.

    """
    try:
        return ir.from_proto(proto)
    except Exception as error:
        cause = error.__cause__ or error
        raise CheckpointError(
            f"{path} is no valid ONNX model ({type(cause).__name__}: {str(cause)[:300]}); export it again"
        ) from error


def save(model: ir.Model, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write an ONNX file, complete or not at all.

    Args:
        model: the model.
        path: where to; ends in ``.onnx``.
        force: replace a file that exists.

    Raises:
        CheckpointError: the file exists or cannot be written, or ONNX's own checker finds it wrong.

    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path}: ONNX models are written as {SUFFIX}; give such a name")
    proto = as_proto(model)
    size = proto.ByteSize()
    if size > MOST_BYTES:
        raise CheckpointError(
            f"{path} would have {size:,} bytes; at most {MOST_BYTES:,} fit a file without external data"
        )
    data = proto.SerializeToString()
    try:
        onnx.checker.check_model(data)
    except onnx.checker.ValidationError as error:
        raise CheckpointError(f"{path}: the model is not valid ONNX: {error}") from error
    write_atomically(path, lambda target: _write(target, data), force=force)


def _write(target: Path, data: bytes) -> None:
    target.write_bytes(data)


def as_proto(model: ir.Model) -> onnx.ModelProto:
    """Return a model as the file holds it.

    onnx-ir describes each initializer a second time among the values, which a file need not do.
    """
    proto = ir.to_proto(model)
    for graph in graphs_of(proto.graph):
        constants = {tensor.name for tensor in graph.initializer}
        kept = [info for info in graph.value_info if info.name not in constants]
        if len(kept) < len(graph.value_info):
            copies = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in kept]
            del graph.value_info[:]
            graph.value_info.extend(copies)
    return proto


def opened(model: Source) -> ir.Model:
    """Return a model that may be given as a path.

    Raises:
        CheckpointError: the file cannot be read.
        ModelError: neither.

    """
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, str | os.PathLike):
        return load(model)
    raise ModelError(
        f"expected a path or a model of onnx-ir, got {type(model).__name__}; onnx_ir.from_proto makes one of "
        "onnx's own"
    )
