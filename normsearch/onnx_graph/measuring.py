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
        is measured as it stands; parameters are the floating-point numbers of its constants.

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


def parameters(model: ir.Model) -> int:
    """Return the number of floating-point numbers in a model's constants."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    values += [
        value for node in model.graph.all_nodes() if node.op_type == "Constant" for value in node.outputs
    ]
    found = [tensor_of(value) for value in values]
    return sum(
        int(tensor.size) for tensor in found if tensor is not None and tensor.dtype.is_floating_point()
    )


def _as_it_stands(found: BatchDependence) -> BatchDependence:
    note = "an ONNX graph runs as it stands; it has one mode alone"
    return replace(found, train_alone=None, train_batches=None, note=found.note or note)
