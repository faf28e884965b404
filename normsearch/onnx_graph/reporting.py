"""document: the report of a conversion of an ONNX graph, with what an inference graph can tell."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from normsearch.calibration import Calibration
from normsearch.errors import PlanError
from normsearch.forward import try_call
from normsearch.onnx_graph.calibration import calibration_record
from normsearch.onnx_graph.conversion import convert
from normsearch.onnx_graph.files import Source, opened
from normsearch.onnx_graph.graphs import tensor_of
from normsearch.onnx_graph.measuring import Metric, compare, parameters
from normsearch.onnx_graph.planning import name_of
from normsearch.onnx_graph.running import Runtime, stand_in
from normsearch.onnx_graph.sites import find_places
from normsearch.plans import Plan
from normsearch.progress import OnProgress, Stage
from normsearch.reporting import Document, parts, sections
from normsearch.reports import Environment
from normsearch.sensitivities import THRESHOLD, Sensitivity
from normsearch.site_outputs import SiteDrift

#: Attributes that say what a node does; not its constants, which calibration changes.
_PLAIN = {
    ir.AttributeType.FLOAT,
    ir.AttributeType.INT,
    ir.AttributeType.STRING,
    ir.AttributeType.FLOATS,
    ir.AttributeType.INTS,
    ir.AttributeType.STRINGS,
}


def document(
    original: Source,
    converted: Source,
    plan: Plan,
    batches: Iterable[Any] | None = None,
    *,
    calibrated: Source | None = None,
    calibration: Calibration | None = None,
    sensitivity: Sensitivity | None = None,
    threshold: float = THRESHOLD,
    metric: Metric | None = None,
    metric_name: str = "metric",
    logits: bool = False,
    title: str | None = None,
    notes: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Document:
    """Measure a conversion of an ONNX graph and return its report.

    It is the report of ``normsearch.reporting.document`` without what needs a network of torch: costs, and
    what gates have learned.

    Args:
        original: the model before, or its path.
        converted: the model after conversion, or its path.
        plan: the plan that converted it.
        batches: inputs, never labels, as for ``compare``; an iterator that runs out is kept in memory.
        calibrated: the model after calibration, or its path.
        calibration: what calibration did; by default what ``calibration_record`` knows.
        sensitivity: of the original, measured before; its vetoes are marked.
        threshold: the drift above which a method is vetoed at a site.
        metric: as for ``compare``.
        metric_name: what to call it.
        logits: as for ``compare``.
        title: what the report is about; by default the graph's name.
        notes: what else its readers should know.
        on_progress: called after each step.

    Raises:
        CheckpointError: a file cannot be read.
        PlanError: the plan is not of the original, or not what made the converted model.
        ModelError: a model fails, outputs do not match, or there is no batch.

    Example:
        >>> import onnx_ir
        >>> from onnx import parser
        >>> from normsearch import onnx_graph
        >>> text = '<ir_version: 8, opset_import: ["": 21]> g (float[N,2,4,4] x) => (float[N,2,4,4] y)'
        >>> text += '<float[2] s = {1, 1}, float[2] b = {0, 0}> {y = BatchNormalization(x, s, b, b, s)}'
        >>> model = onnx_ir.from_proto(parser.parse_model(text))
        >>> plan = onnx_graph.plan(model, "instance")
        >>> made = onnx_graph.document(model, onnx_graph.convert(model, plan), plan)
        >>> [section.kind for section in made.sections]
        ['summary', 'layers']

    """
    before = opened(original)
    models = [opened(converted), *([] if calibrated is None else [opened(calibrated)])]
    if batches is not None and iter(batches) is batches:
        batches = list(batches)
    first = None if batches is None else next(iter(batches), None)
    _check(plan, before, models, first)
    if calibration is None and calibrated is not None:
        calibration = calibration_record(models[-1])
    found = None if batches is None else _measure(before, models, plan, batches, logits, on_progress)
    made: list[sections.Section | None] = [
        parts.summary(plan, (parameters(before), parameters(models[-1])), found)
    ]
    if metric is not None:
        scores = [parts.finite(float(metric(Runtime(model)))) for model in (before, *models)]
        made.append(
            sections.Metric(
                name=metric_name,
                original=scores[0],
                converted=scores[1],
                calibrated=scores[2] if len(models) > 1 else None,
            )
        )
    if calibration is not None:
        made.append(parts.calibration(calibration))
    made.append(parts.layers(plan, found))
    if sensitivity is not None:
        made.append(parts.heat_map(sensitivity, plan, threshold))
    if found is not None:
        made.append(found.dependence)
    made.append(parts.notes(plan, notes, found, () if sensitivity is None else sensitivity.refusals))
    # The package imports this module.
    from normsearch import __version__

    return Document(
        title=f"the ONNX graph {before.graph.name or ''!r}" if title is None else title,
        environment=Environment.here(stand_in(before)),
        normsearch=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sections=tuple(part for part in made if part is not None),
    )


def _check(plan: Plan, original: ir.Model, models: Sequence[ir.Model], inputs: Any) -> None:
    """Raise unless models have the nodes that a plan makes of the original."""
    # A file tells less of shapes than inputs do, and what is written depends on them.
    expected = [convert(original, plan)]
    if inputs is not None:
        expected.append(convert(original, plan, inputs=inputs))
    for model, which in zip(models, ("converted", "calibrated"), strict=False):
        # The bias that a MatMul gains in calibration is an Add.
        without = {"Add"} if which == "calibrated" else set()
        if _outline(model, without) not in [_outline(one, without) for one in expected]:
            raise PlanError(
                f"the {which} model is not what the plan makes of {name_of(original)}; give the plan that "
                "converted it, which the same methods make again"
            )


def _outline(model: ir.Model, without: Collection[str]) -> list[tuple[Any, ...]]:
    """Return the operators of a model, subgraphs' too, with attributes and sizes, without weights."""
    return [
        (
            node.domain,
            node.op_type,
            sorted(
                (key, _said(one.value))
                for key, one in node.attributes.items()
                if one.type in _PLAIN and not (node.op_type == "Gemm" and key in _WEIGHTS_OF_GEMM)
            ),
            [
                held.numpy().tolist()
                for held in map(tensor_of, node.inputs)
                if held is not None and _is_size(held)
            ],
        )
        for node in model.graph.all_nodes()
        if node.op_type not in without
    ]


#: Factors that become part of the weight and the bias where these are written anew.
_WEIGHTS_OF_GEMM = ("alpha", "beta")
#: The most numbers that a shape or a list of axes has.
_MOST_SIZES = 16


def _is_size(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype == ir.DataType.INT64 and tensor.size <= _MOST_SIZES


def _said(value: Any) -> str:
    # A file has single precision.
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_said, value)) if isinstance(value, tuple | list) else str(value)


def _measure(
    original: ir.Model,
    models: Sequence[ir.Model],
    plan: Plan,
    batches: Iterable[Any],
    logits: bool,
    on_progress: OnProgress | None,
) -> parts.Found:
    stage = Stage("measuring", 2 * len(models), on_progress)
    counted = _Counted(batches)
    reports, drifts = [], []
    for model in models:
        reports.append(compare(original, model, counted, logits=logits))
        stage.advance("outputs")
        drifts.append(_site_drifts(original, model, plan, batches))
        stage.advance("layers")
    dependence = reports[-1].batch_dependence
    return parts.Found(
        counted.batches,
        reports[-1].batch_size,
        [parts.moved(report) for report in reports],
        drifts,
        sections.Dependence(before=parts.known(dependence.before), after=parts.known(dependence.after)),
    )


class _Counted:
    """Batches that are counted while they are read."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self.batches = 0

    def __iter__(self) -> Any:
        self.batches = 0
        for inputs in self._source:
            self.batches += 1
            yield inputs


def _site_drifts(
    original: ir.Model, converted: ir.Model, plan: Plan, batches: Iterable[Any]
) -> dict[str, SiteDrift]:
    """Return how far the output of every site moved, where both graphs have it under its name."""
    places = {place.site.path: place for place in find_places(original)}
    made = {value.name for node in converted.graph for value in node.outputs}
    names: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for site in plan.sites:
        node = places[site.path].node
        name = node.outputs[0].name or ""
        if node.graph is not original.graph:
            reasons[site.path] = "it is in a subgraph, whose values are not seen from outside"
        elif name not in made:
            reasons[site.path] = "the activation that followed it is part of the new layer"
        else:
            names[site.path] = name
    sums = _sums(original, converted, dict.fromkeys(names.values()), batches) if names else {}
    depths = {path: depth for depth, path in enumerate(places)}
    found = {path: SiteDrift(path, None, None, reason) for path, reason in reasons.items()}
    for path, name in names.items():
        apart, size = sums[name]
        relative = (apart / size) ** 0.5 if size else float(apart > 0)
        finite = relative < float("inf")
        reason = None if finite else "an output there is not finite"
        found[path] = SiteDrift(path, depths[path], relative if finite else None, reason)
    return found


def _sums(
    original: ir.Model, converted: ir.Model, names: Mapping[str, Any], batches: Iterable[Any]
) -> dict[str, tuple[float, float]]:
    """Return Σ‖after − before‖² and Σ‖before‖² of values by name."""
    runtimes = Runtime(original, list(names)), Runtime(converted, list(names))
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    for inputs in batches:
        before, after = (try_call(runtime, inputs) for runtime in runtimes)
        for name, total in sums.items():
            total += _apart(before[name].double(), after[name].double())
    return {name: (float(total[0]), float(total[1])) for name, total in sums.items()}


def _apart(before: Tensor, after: Tensor) -> Tensor:
    return torch.stack([(after - before).square().sum(), before.square().sum()])
