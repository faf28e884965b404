"""The report of a conversion of an ONNX graph: its numbers are those of the same conversion in torch."""

from __future__ import annotations

import pytest
import torch

import normsearch
from normsearch.errors import PlanError
from normsearch.reporting import CalibrationPart, Cost, Dependence, Document, Layers, Metric, Notes, Summary
from normsearch.site_outputs import site_drift

pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

import onnx_ir
from onnx import parser
from onnx_networks import Twin, model

from normsearch import onnx_graph
from normsearch.onnx_graph.running import Runtime


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2)).split(6))


def test_drifts_of_sites_and_outputs_are_torchs(batches: list[torch.Tensor]) -> None:
    twin = Twin().eval()
    to = {"bn2": "batch", "*": "group(groups=8)"}
    network = normsearch.convert(twin, to)
    expected = {drift.site: drift for drift in site_drift(twin, network, batches)}
    original = model(twin)
    plan = onnx_graph.plan(original, to)
    made = onnx_graph.document(original, onnx_graph.convert(original, plan), plan, batches, title="twin")
    layers, summary, dependence = made.section(Layers), made.section(Summary), made.section(Dependence)
    assert layers is not None
    for row in layers.rows:
        assert (row.depth, row.reason) == (expected[row.site].depth, None)
        assert row.converted == pytest.approx(expected[row.site].relative_l2, rel=1e-3)
    assert summary is not None
    assert (summary.changed, summary.batches, summary.calibrated) == (3, 4, None)
    assert summary.converted is not None
    drift = normsearch.compare(twin, network, batches).drift.relative_l2
    assert summary.converted.relative_l2 == pytest.approx(drift, rel=1e-3)
    assert dependence is not None
    assert dependence.after.train_batches is None
    assert made.section(Cost) is None
    assert Document.from_json(made.to_json()) == made
    assert "twin" in made.to_html()


def test_what_calibration_and_a_metric_say(batches: list[torch.Tensor]) -> None:
    original = model(Twin().eval())
    plan = onnx_graph.plan(original, "layer")
    converted = onnx_graph.convert(original, plan)
    calibrated = onnx_graph.calibrate(converted, original, batches)

    def mean(graph: Runtime) -> float:
        return float(torch.cat([next(iter(graph(x).values())) for x in batches]).mean())

    # Batches that run out are read as often as others.
    made = onnx_graph.document(
        original, converted, plan, iter(batches), calibrated=calibrated, metric=mean, metric_name="mean"
    )
    record, part = onnx_graph.calibration_record(calibrated), made.section(CalibrationPart)
    assert record is not None
    assert part is not None
    assert (part.before, part.after) == (record.error.before, record.error.after)
    metric = made.section(Metric)
    assert metric is not None
    assert [metric.original, metric.converted, metric.calibrated] == [
        mean(Runtime(graph)) for graph in (original, converted, calibrated)
    ]
    summary, layers = made.section(Summary), made.section(Layers)
    assert summary is not None
    assert summary.converted is not None
    assert summary.calibrated is not None
    assert summary.converted.relative_l2 is not None
    assert summary.calibrated.relative_l2 is not None
    assert summary.calibrated.relative_l2 < summary.converted.relative_l2
    assert layers is not None
    assert layers.rows[-1].calibrated == pytest.approx(summary.calibrated.relative_l2, rel=1e-3)
    assert made.title == "the ONNX graph 'network'"


def test_what_cannot_be_seen_has_a_reason(batches: list[torch.Tensor]) -> None:
    original = model(Twin().eval())
    plan = onnx_graph.plan(original, {"bn1": "filter_response", "*": "batch_renorm"})
    made = onnx_graph.document(original, onnx_graph.convert(original, plan), plan, batches)
    layers, notes = made.section(Layers), made.section(Notes)
    assert layers is not None
    first, second, *_ = layers.rows
    assert (first.converted, first.depth) == (None, None)
    assert first.reason == "the activation that followed it is part of the new layer"
    assert second.converted is not None
    assert notes is not None
    assert any("a scale and a shift per channel are left" in note.text for note in notes.notes)


def test_a_graph_for_one_batch_size_is_compared() -> None:
    fixed = model(Twin().eval())
    for value in (*fixed.graph.inputs, *fixed.graph.outputs):
        assert value.shape is not None
        value.shape = type(value.shape)([4, *list(value.shape)[1:]])
    report = onnx_graph.compare(fixed, onnx_graph.convert(fixed, "group"), [torch.randn(4, 3, 8, 8)])
    assert report.drift.relative_l2 > 0
    dependence = report.batch_dependence.after
    assert dependence.eval_batches is None
    assert dependence.note is not None
    assert "no other batch than one of 4" in dependence.note


@pytest.mark.parametrize("node", ["MatMul(x, w)", "Gemm<alpha=0.5, beta=1.0>(x, w)"])
def test_whitening_writes_a_linear_node_anew_and_stays_the_plans(node: str) -> None:
    """The bias that a MatMul gains is a node of its own, the factors of a Gemm go."""
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y)
        <float[4,4] w = {{
            1.0, 0.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.0, 1000.0}},
        float[4] s = {{1.0, 1.0, 1.0, 1.0}}, float[4] b = {{0.0, 0.0, 0.0, 0.0}},
        float[4] m = {{0.0, 0.0, 0.0, 0.0}}, float[4] v = {{1.0, 100.0, 10000.0, 1000000.0}}>
        {{h = {node}  y = BatchNormalization(h, s, b, m, v)}}"""
    original = onnx_ir.from_proto(parser.parse_model(text))
    inputs = list(torch.randn(120, 4, generator=torch.Generator().manual_seed(0)).split(20))
    plan = onnx_graph.plan(original, "layer")
    converted = onnx_graph.convert(original, plan)
    calibrated = onnx_graph.calibrate(converted, original, inputs)
    record = onnx_graph.calibration_record(calibrated)
    assert record is not None
    assert record.whitened == ("y",)
    made = onnx_graph.document(original, converted, plan, inputs, calibrated=calibrated)
    summary = made.section(Summary)
    assert summary is not None
    assert summary.calibrated is not None
    with pytest.raises(PlanError, match="the calibrated model is not what the plan makes"):
        onnx_graph.document(original, converted, plan, inputs, calibrated=original)
