"""Sensitivity of an ONNX graph: its numbers and refusals are those of the same network in torch."""

from __future__ import annotations

import pytest
import torch

import normsearch
from normsearch.errors import ModelError, PlanError

pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

import onnx_ir
from onnx import parser
from onnx_networks import Twin, model

from normsearch import onnx_graph

TRIED = [name for name in normsearch.METHODS if name not in ("evonorm_s0", "filter_response")]


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    return list(torch.randn(18, 3, 8, 8, generator=torch.Generator().manual_seed(4)).split(6))


def test_drifts_and_refusals_are_torchs(batches: list[torch.Tensor]) -> None:
    twin = Twin().eval()
    steps: list[normsearch.Progress] = []
    found = onnx_graph.sensitivity(model(twin), TRIED, iter(batches), on_progress=steps.append)
    expected = normsearch.sensitivity(twin, TRIED, batches)
    assert found.sites == expected.sites
    assert found.methods == expected.methods
    for site in found.sites:
        for method in found.methods:
            value, wanted = found.drift[site][method], expected.drift[site][method]
            assert (value is None) == (wanted is None), (site, method)
            if value is not None and wanted is not None:
                assert value == pytest.approx(wanted, rel=1e-3, abs=2e-6), (site, method)
    refused = [(one.site, one.method) for one in found.refusals]
    assert refused == [(one.site, one.method) for one in expected.refusals]
    assert ("bn4", "instance") in refused
    assert (steps[-1].done, steps[-1].total) == (4 * len(TRIED), 4 * len(TRIED))
    assert normsearch.Sensitivity.from_json(found.to_json()) == found


def test_a_single_site_is_changed_and_the_model_stays(batches: list[torch.Tensor]) -> None:
    graph = model(Twin().eval())
    found = onnx_graph.sensitivity(graph, ["group(groups=4)", "batch"], batches, sites=["bn2"])
    assert found.sites == ("bn2",)
    assert found.drift["bn2"]["batch"] == 0
    changed = onnx_graph.convert(graph, {"bn2": "group(groups=4)", "*": "batch"})
    drift = onnx_graph.compare(graph, changed, batches).drift.relative_l2
    assert found.drift["bn2"]["group(groups=4)"] == pytest.approx(drift, rel=1e-6)
    assert len(onnx_graph.find_sites(graph)) == 4


@pytest.mark.parametrize("taken", [True, False])
def test_sites_that_no_output_depends_on_are_refused(taken: bool) -> None:
    """A branch that is not taken, and a node whose output nothing reads."""
    text = f"""
        <ir_version: 8, opset_import: ["": 21]> g (float[N,2,4,4] x) => (float[N,2,4,4] y)
        <float[2] s = {{1, 1}}, float[2] b = {{0, 0}}, bool c = {{{int(taken)}}}> {{
            unread = BatchNormalization(x, s, b, b, s)
            y = If(c) <
                then_branch = then () => (float[N,2,4,4] inner) {{inner = BatchNormalization(x, s, b, b, s)}},
                else_branch = other () => (float[N,2,4,4] same) {{same = Identity(x)}}>
        }}"""
    graph = onnx_ir.from_proto(parser.parse_model(text))
    found = onnx_graph.sensitivity(graph, ["frozen", "instance"], [torch.randn(3, 2, 4, 4)])
    refused = {(one.site, str(one.method)): one.reason for one in found.refusals}
    for site, matters in (("unread", False), ("inner", taken)):
        for method in found.methods:
            assert (found.drift[site][method] is not None) == matters
            assert refused.get((site, method)) == (None if matters else "no batch reached the site")


def test_names_that_repeat_run(batches: list[torch.Tensor]) -> None:
    graph = model(Twin().eval())
    expected = onnx_graph.sensitivity(graph, "layer", batches)
    for node in graph.graph:
        node.name = "same"
    found = onnx_graph.sensitivity(graph, "layer", batches)
    drifts = [[row["layer"] for row in one.drift.values()] for one in (found, expected)]
    assert drifts[0] == pytest.approx(drifts[1])


def test_what_cannot_be_measured_is_said(batches: list[torch.Tensor]) -> None:
    graph = model(Twin().eval())
    with pytest.raises(ModelError, match="no batch"):
        onnx_graph.sensitivity(graph, "group", [])
    with pytest.raises(PlanError, match="no method"):
        onnx_graph.sensitivity(graph, [], batches)
    with pytest.raises(PlanError, match="no site matches 'layer9'"):
        onnx_graph.sensitivity(graph, "group", batches, sites=["layer9"])
    with pytest.raises(ModelError, match=r"failed on the given inputs.*it takes x float \(batch, 3, 8, 8\)"):
        onnx_graph.sensitivity(graph, "group", [torch.randn(2, 4, 8, 8)])
    with pytest.raises(ModelError, match="type ndarray; give tensors of torch"):
        onnx_graph.sensitivity(graph, "group", [batches[0].numpy()])
    with pytest.raises(ModelError, match="batch 1 hold no floating-point number"):
        onnx_graph.sensitivity(graph, "group", [torch.randn(0, 3, 8, 8)])
    with pytest.raises(ModelError, match="batch 2 are not finite"):
        onnx_graph.sensitivity(graph, "group", [batches[0], batches[0] * float("nan")])
