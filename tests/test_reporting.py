"""The report of a conversion: what it holds, as data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reported
import torch
from reported import reference, small, trained
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from normsearch import ModelError, ReportError
from normsearch.reporting import Document, document, page, sections
from normsearch.reporting.search_sections import SEARCH_SECTIONS


@pytest.fixture
def net() -> nn.Module:
    return reported.network()


@pytest.fixture
def batches() -> list[Tensor]:
    return reported.inputs()


@pytest.fixture
def made(net: nn.Module, batches: list[Tensor]) -> tuple[Document, nn.Module, nn.Module, nn.Module]:
    return reported.report(net, batches)


def part(found: Document, kind: type[Any]) -> Any:
    section = found.section(kind)
    assert section is not None
    return section


def test_document_holds_what_was_measured(
    made: tuple[Document, nn.Module, nn.Module, nn.Module], batches: list[Tensor]
) -> None:
    found, net, converted, calibrated = made
    with torch.no_grad():
        old, new, last = (torch.cat([m(x) for x in batches]) for m in (net, converted, calibrated))
    summary = part(found, sections.Summary)
    assert (summary.sites, summary.changed, summary.batches) == (4, 3, 2)
    assert summary.batch_size == len(batches[0])
    cost = part(found, sections.Cost)
    assert cost.before.batch_size == cost.after.batch_size == len(batches[0])
    assert f"2 batches, the first of {len(batches[0])} samples" in found.to_html()
    assert f"on the first batch, of {len(batches[0])} samples" in found.to_html()
    assert summary.methods == {"batch_instance": 1, "batch": 1, "switchable": 1, "group(groups=1)": 1}
    assert (summary.exact, summary.batch_independent) == (False, False)
    assert summary.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (net, calibrated))
    for moved, outputs in ((summary.converted, new), (summary.calibrated, last)):
        assert moved.relative_l2 == pytest.approx(float((outputs - old).norm() / old.norm()), rel=1e-12)
        assert moved.top1_agreement == float((outputs.argmax(1) == old.argmax(1)).double().mean())
        kl = F.kl_div(outputs.log_softmax(1), old.softmax(1), reduction="batchmean")
        assert moved.kl == pytest.approx(float(kl), rel=1e-9)
    metric = part(found, sections.Metric)
    assert metric.name == "sum of outputs"
    scores = [float(m(batches[0]).detach().sum()) for m in (net, converted, calibrated)]
    assert [metric.original, metric.converted, metric.calibrated] == pytest.approx(scores, rel=1e-12)
    rows = {row.site: row for row in part(found, sections.Layers).rows}
    for path in ("first.1", "twice", "last"):
        assert rows[path].converted == pytest.approx(reference(net, converted, path, batches), rel=1e-9)
        assert rows[path].calibrated == pytest.approx(reference(net, calibrated, path, batches), rel=1e-9)
    assert rows["unused"].reason == "the forward pass does not reach it"
    assert [(row.layer, row.method, row.exact, row.changed) for row in rows.values()] == [
        ("BatchNorm2d", "batch_instance", True, True),
        ("BatchNorm2d", "batch", True, False),
        ("BatchNorm2d", "switchable", False, True),
        ("BatchNorm2d", "group(groups=1)", False, True),
    ]
    dependence = part(found, sections.Dependence)
    assert dependence.before.eval_batches < 1e-12 < dependence.before.train_batches
    cost = part(found, sections.Cost)
    assert (cost.before.parameters, cost.after.parameters) == summary.parameters
    assert cost.before.peak_memory_bytes > 0 < cost.after.latency_ms


def test_document_holds_gates_and_calibration(made: tuple[Document, nn.Module, nn.Module, nn.Module]) -> None:
    found, _, _, calibrated = made
    gates = part(found, sections.Gates)
    (gate,), (mixture,) = gates.gates, gates.mixtures
    rho = torch.linspace(-0.2, 1.2, 16).double().clamp(0, 1)
    assert (gate.site, gate.channels) == ("first.1", 16)
    assert (gate.mean, gate.least, gate.most) == pytest.approx((float(rho.mean()), 0, 1), abs=1e-7)
    expected = [
        sum(1 for r in rho.tolist() if (r * 10 >= i) and (r * 10 < i + 1 or i == 9)) for i in range(10)
    ]
    assert list(gate.histogram) == expected
    assert mixture.site == "twice"
    weights = torch.tensor([0.0, 1.0, 2.0]).double().softmax(0)
    assert mixture.mean == pytest.approx(weights.tolist(), rel=1e-12)
    variance = calibrated.get_submodule("twice").var_logits.detach().double().softmax(0)
    assert mixture.variance == pytest.approx(variance.tolist(), rel=1e-12)
    done = part(found, sections.CalibrationPart)
    assert (done.before, done.after, done.batches, done.held_out) == (0.3, 0.1, 8, 2)
    assert (done.whitened, done.gained_bias) == (("last",), ("middle",))
    assert [(step.name, step.error, step.kept, step.steps) for step in done.steps] == [
        ("whitening", 0.2, True, 0),
        ("affine", None, False, 20),
    ]


def test_document_holds_the_sensitivity(
    made: tuple[Document, nn.Module, nn.Module, nn.Module], batches: list[Tensor]
) -> None:
    found, net, _, _ = made
    heat = part(found, sections.HeatMap)
    assert (heat.methods, heat.threshold) == (("group", "instance", "identity"), 0.2)
    rows = {row.site: row for row in heat.rows}
    with torch.no_grad():
        old = torch.cat([net(x) for x in batches])
    for site in ("first.1", "twice", "last"):
        for number, method in enumerate(heat.methods):
            drift = rows[site].drift[number]
            if number in rows[site].refused:
                assert drift is None
                assert (site, method) in {(r.site, r.method) for r in part(found, sections.Notes).refusals}
                continue
            one = normsearch.convert(net, {site: method}, inputs=batches[0])
            with torch.no_grad():
                new = torch.cat([one(x) for x in batches])
            assert drift == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-6, abs=1e-12)
            assert (number in rows[site].vetoed) == (drift > 0.2)
    assert rows["last"].chosen == 0
    assert rows["twice"].chosen is None
    assert any(row.vetoed for row in heat.rows)
    assert any(row.refused for row in heat.rows)


def test_document_without_batches(net: nn.Module) -> None:
    plan = normsearch.plan(net, "frozen")
    found = document(net, normsearch.convert(net, plan), plan)
    assert [section.kind for section in found.sections] == ["summary", "layers"]
    assert part(found, sections.Layers).rows[0].converted is None
    assert "<svg" not in found.to_html()
    assert Document.from_json(found.to_json()) == found


def test_document_reads_an_iterator_and_reports_progress(net: nn.Module, batches: list[Tensor]) -> None:
    plan = normsearch.plan(net, "group")
    converted = normsearch.convert(net, plan)
    steps: list[normsearch.Progress] = []
    found = document(net, converted, plan, iter(batches), on_progress=steps.append)
    assert part(found, sections.Summary).batches == 2
    assert (steps[-1].done, steps[-1].total) == (4, 4)
    again = document(net, converted, plan, batches)
    assert found.section(sections.Layers) == again.section(sections.Layers)
    with pytest.raises(ModelError, match="no batch"):
        document(net, converted, plan, [])


def test_crop_dependence_and_unmeasurable_batches() -> None:
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)))
    plan = normsearch.plan(model, "group")
    found = document(
        model, normsearch.convert(model, plan), plan, [torch.randn(2, 3, 16, 16)], crop=normsearch.Crop(8, 2)
    )
    dependence = part(found, sections.Dependence)
    assert dependence.crop is not None
    assert dependence.crop[0] < 1e-5 < dependence.crop[1]
    assert dependence.before.eval_alone is None
    notes = [note.text for note in part(found, sections.Notes).notes]
    assert any("three are needed" in note for note in notes)
    assert Document.from_json(found.to_json()) == found


def test_networks_with_outputs_that_are_no_numbers_have_a_report(
    net: nn.Module, batches: list[Tensor]
) -> None:
    plan = normsearch.plan(net, "group")
    converted = normsearch.convert(net, plan)
    converted.get_submodule("last").bias.data[0] = float("nan")
    found = document(net, converted, plan, batches)
    assert part(found, sections.Summary).converted == sections.Moved(relative_l2=None)
    assert Document.from_json(found.to_json()) == found
    assert "–" in found.to_html()


def test_fused_layers_have_gates() -> None:
    model = normsearch.build(normsearch.Architecture("timm/tinynet_e", {"num_classes": 3})).eval()
    plan = normsearch.plan(model, "switchable")
    found = document(model, normsearch.convert(model, plan), plan)
    assert len(part(found, sections.Gates).mixtures) == len(plan)


def test_json_comes_back(made: tuple[Document, nn.Module, nn.Module, nn.Module], tmp_path: Path) -> None:
    found = made[0]
    assert Document.from_json(found.to_json()) == found
    assert {section.kind for section in found.sections} == set(sections.SECTIONS) - set(SEARCH_SECTIONS)
    html, text = found.save(tmp_path / "report.html")
    assert html.read_text("utf-8").rstrip() == found.to_html().rstrip()
    assert Document.from_json(text.read_bytes()) == found
    with pytest.raises(normsearch.CheckpointError, match="exists"):
        found.save(tmp_path / "report")
    found.save(tmp_path / "report.json", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    with pytest.raises(ReportError, match=r"written as \.html and \.json"):
        found.save(tmp_path / "report.pdf")


def altered(change: Any) -> str:
    plain = json.loads(small().to_json())
    change(plain)
    return json.dumps(plain)


def _set(path: str, value: Any) -> Any:
    def change(plain: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            plain = plain[int(key) if key.isdigit() else key]
        plain[last] = value

    return change


MALFORMED = (
    ("{", "not a report"),
    ("[]", "its format is not"),
    ('{"format": "normsearch report"}', "reads version 1"),
    (altered(_set("format", "x")), "its format is not"),
    (altered(_set("version", 2)), "a report of version 2; this normsearch reads version 1"),
    (altered(_set("sections", {})), "no list of sections"),
    (altered(_set("sections.0.kind", "history")), "unknown kind 'history'; there are summary"),
    (altered(_set("sections.0.kind", ["layers"])), "unknown kind"),
    (altered(_set("sections.0.rows.0.converted", "much")), "rows.0.converted"),
    (altered(_set("sections.0.rows.0.site", None)), "rows.0.site"),
    (
        altered(_set("sections.0.rows.0.colour", "red")),
        "fields that this version of normsearch does not know",
    ),
    (altered(_set("environment.threads", "many")), "environment.threads"),
    (altered(_set("title", 3)), "title"),
    (small().to_json().replace("0.5", "NaN"), "not a report"),
    ("[" * 100_000, "not a report"),
)


def test_reports_that_do_not_say_the_batch_size_are_read(
    made: tuple[Document, nn.Module, nn.Module, nn.Module],
) -> None:
    old = json.loads(made[0].to_json())
    for section in old["sections"]:
        for place in (section, section.get("before"), section.get("after")):
            if isinstance(place, dict):
                place.pop("batch_size", None)
    found = Document.from_json(json.dumps(old))
    assert part(found, sections.Summary).batch_size is None
    assert part(found, sections.Cost).before.batch_size is None
    assert "<dd>2 batches</dd>" in found.to_html()


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=[message[:30] for _, message in MALFORMED])
def test_malformed_json_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        Document.from_json(text)


def test_largest_steps_are_those_of_changed_sites() -> None:
    row = small().sections[0].rows[0]  # type: ignore[union-attr]
    drifts = (0.1, 0.15, 0.5, 0.45, 0.9)
    rows = tuple(
        replace(row, site=str(n), depth=n, converted=drift, changed=n != 4) for n, drift in enumerate(drifts)
    )
    found = page.largest_steps(sections.Layers(rows=rows))
    assert [(r.site, round(step, 9)) for r, step in found] == [("2", 0.35), ("0", 0.1), ("1", 0.05)]
