"""compare: what a conversion changed in the outputs of an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from normsearch import measurement
from normsearch.dependence import BatchDependence
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.graphs import tensor_of
from normsearch.onnx_graph.running import Runtime
from normsearch.onnx_graph.sites import find_places
from normsearch.reports import Change, Report

Metric = Callable[[Runtime], float]


def compare(
    original: Source,
    converted: Source,
    batches: Iterable[Any],
    *,
    logits: bool = False,
    metric: Metric | None = None,
) -> Report:
    """Measure what a conversion changed, by onnxruntime on the CPU.

    Args:
        original: the model before, or its path.
        converted: the model after, or its path.
        batches: inputs, never labels: a tuple in the order of the graph's inputs, a dict by name, anything
            else the only input.
        logits: as for ``normsearch.compare``.
        metric: a number for a model, called with both as modules: tensors in, a dict of tensors out.

    Returns:
        The report of ``normsearch.compare``. An ONNX graph has one mode, so dependence on the batch
        is measured as it stands; parameters are counted as ``parameters`` does.

    Raises:
        CheckpointError: a file cannot be read.
        ModelError: a model fails, outputs do not match, or there is no batch.

    """
    models = opened(original), opened(converted)
    before, after = (Runtime(model) for model in models)
    given: Any = None if metric is None else metric
    report = measurement.compare(before, after, batches, logits=logits, metric=given)
    dependence = report.batch_dependence
    return replace(
        report,
        batch_dependence=Change(_as_it_stands(dependence.before), _as_it_stands(dependence.after)),
        parameters=Change(*(parameters(model) for model in models)),
        batch_norms=Change(*(len(find_places(model)) for model in models)),
    )


#: The inputs that hold no weights though they may hold many numbers: running statistics; sizes.
_NO_WEIGHTS = {"BatchNormalization": (3, 4), "Resize": (1, 2), "Upsample": (1,)}
#: Operators whose constants are weights even where they are one number.
_WEIGHTED = {
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "Gemm",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
    "PRelu",
}


def parameters(model: ir.Model) -> int:
    """Return the number of a model's parameters, as nearly as its graph tells what torch would count.

    These are the floating-point numbers in constants that operators read as weights. Not counted are running
    statistics, sizes, single numbers of arithmetic (eps, limits, exponents), and the ones and zeros of an
    InstanceNormalization that scales nothing. A constant that several read counts once.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    values += [
        value for node in model.graph.all_nodes() if node.op_type == "Constant" for value in node.outputs
    ]
    found = [(value, tensor_of(value)) for value in values]
    return sum(
        int(tensor.size)
        for value, tensor in found
        if tensor is not None and tensor.dtype.is_floating_point() and _is_weight(value, tensor)
    )


def _is_weight(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Tell whether any operator reads a constant as a weight."""
    for node, place in value.uses():
        if node.op_type == "Identity":
            if _is_weight(node.outputs[0], tensor):
                return True
        elif node.op_type == "InstanceNormalization":
            # Neither torch's layers without an affine nor groups written as instances have these.
            neutral = 1 if place == 1 else 0
            if not bool((tensor.numpy() == neutral).all()):
                return True
        elif place not in _NO_WEIGHTS.get(node.op_type, ()) and (
            tensor.size > 1 or node.op_type in _WEIGHTED
        ):
            return True
    return False


def _as_it_stands(found: BatchDependence) -> BatchDependence:
    note = "an ONNX graph runs as it stands; it has one mode alone"
    return replace(found, train_alone=None, train_batches=None, note=found.note or note)
