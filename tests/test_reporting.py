"""Reports: every number against a slow reference, JSON that comes back, and a page that is safe and whole."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import normsearch
from normsearch import ModelError, Refusal, ReportError, site_outputs
from normsearch.calibration import Calibration, Rung
from normsearch.dependence import BatchDependence
from normsearch.reporting import Document, charts, document, page, sections
from normsearch.reporting.gates import gates_of
from normsearch.reporting.search_sections import SEARCH_SECTIONS
from normsearch.reports import Change, Environment, Profile
from normsearch.site_outputs import SiteDrift, site_drift
from normsearch.text import percent, visible


class Net(nn.Module):
    """Four sites: one twice per pass, one never reached, one followed by an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.unused = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.twice = nn.BatchNorm2d(16)
        self.last = nn.BatchNorm2d(16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        x = self.last(self.twice(x.relu_()) + self.middle(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
    return model.eval()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net().double())


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 7, 7, dtype=torch.float64, generator=generator) for size in (4, 3)]


def outputs_at(model: nn.Module, path: str, batches: list[Tensor]) -> list[Tensor]:
    """Every output of one layer, copied as it leaves the layer."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    with torch.no_grad():
        for inputs in batches:
            model(inputs)
    handle.remove()
    return seen


def reference(original: nn.Module, converted: nn.Module, path: str, batches: list[Tensor]) -> float:
    old, new = (torch.cat([y.flatten() for y in outputs_at(m, path, batches)]) for m in (original, converted))
    return float((new - old).norm() / old.norm())


# Drift of each site


def test_site_drift_is_that_of_the_outputs(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, "group")
    found = {drift.site: drift for drift in site_drift(net, converted, batches)}
    assert list(found) == ["first.1", "unused", "twice", "last"]
    for path in ("first.1", "twice", "last"):
        assert found[path].relative_l2 == pytest.approx(reference(net, converted, path, batches), rel=1e-12)
    assert {path: drift.depth for path, drift in found.items()} == {
        "first.1": 0,
        "unused": None,
        "twice": 1,
        "last": 2,
    }
    assert found["unused"] == SiteDrift("unused", None, None, "the forward pass does not reach it")


@pytest.mark.parametrize("most", [0, 10_000, 30_000])
def test_site_drift_in_several_passes_is_the_same(
    most: int, net: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = normsearch.convert(net, "layer")
    whole = site_drift(net, converted, batches)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(site_outputs, "_MOST_BYTES", most)
    assert site_drift(net, converted, batches) == whole
    assert len(passes) > len(batches)


def test_site_drift_leaves_models_as_they_were(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, "group")
    for model in (net, converted):
        model.train()
        model.get_submodule("first").eval()
    before = [
        ({k: v.clone() for k, v in m.state_dict().items()}, [x.training for x in m.modules()])
        for m in (net, converted)
    ]
    random = torch.get_rng_state()
    site_drift(net, converted, batches)
    for model, (state, modes) in zip((net, converted), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_folded_layers_keep_an_output_to_compare(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, {"first.1": "identity"})
    assert isinstance(converted.get_submodule("first.1"), nn.Identity)
    drift = site_drift(net, converted, batches)[0]
    assert drift.relative_l2 is not None
    assert drift.relative_l2 < 1e-12


def test_what_cannot_be_compared_says_why(net: nn.Module, batches: list[Tensor]) -> None:
    converted = normsearch.convert(net, "group")
    converted.last = nn.Sequential()
    del converted.twice
    converted.forward = lambda x: converted.last(converted.first(x))[:, :, 1:].mean((2, 3))
    found = {drift.site: drift for drift in site_drift(net, converted, batches)}
    assert found["twice"].reason == "the converted model has no layer there"
    converted = normsearch.convert(net, "group")
    converted.last = nn.Flatten()
    converted.head = nn.Identity()
    converted.forward = lambda x: converted.last(converted.twice(converted.first(x)))
    found = {drift.site: drift for drift in site_drift(net, converted, batches)}
    assert found["last"].reason == "its outputs before and after have no common shape"
    assert found["twice"].reason == "called 2 times before and 1 times after"
    broken = normsearch.convert(net, "group")
    broken.get_submodule("last").weight.data[0] = float("nan")
    assert site_drift(net, broken, batches)[3].reason == "an output there is not finite"
    with pytest.raises(ModelError, match="got no batch"):
        site_drift(net, converted, [])


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.register_buffer("mean", torch.full((32,), 0.3))
        self.register_buffer("var", torch.full((32,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


def test_functional_sites_have_a_drift() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    x = torch.randn(4, 3, 8, 8)
    converted = normsearch.convert(model, "group", inputs=x)
    (drift,) = site_drift(model, converted, [x])
    with torch.no_grad():
        old, new = model(x), converted(x)
    assert drift.relative_l2 == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)


# The document


@pytest.fixture
def made(net: nn.Module, batches: list[Tensor]) -> tuple[Document, nn.Module, nn.Module, nn.Module]:
    plan = normsearch.plan(
        net, {"first*": "batch_instance", "twice": "switchable", "last": "group"}, inputs=batches[0]
    )
    converted = normsearch.convert(net, plan)
    calibrated = normsearch.convert(net, plan)
    calibrated.get_submodule("last").weight.data *= 1.01
    rho = calibrated.get_submodule("first.1").rho.data
    rho.copy_(torch.linspace(-0.2, 1.2, 16))
    logits = calibrated.get_submodule("twice").mean_logits.data
    logits.copy_(torch.tensor([0.0, 1.0, 2.0]))
    sensitivity = normsearch.sensitivity(net, ["group", "instance", "identity"], batches)
    record = Calibration(
        error=Change(0.3, 0.1),
        sites={},
        rungs=(Rung("whitening", 0.2, True, 0, 1.5), Rung("affine", float("nan"), False, 20, 2.0)),
        whitened=("last",),
        gained_bias=("middle",),
        batches=8,
        held_out=2,
    )
    found = document(
        net,
        converted,
        plan,
        batches,
        calibrated=calibrated,
        calibration=record,
        sensitivity=sensitivity,
        threshold=0.2,
        metric=lambda model: float(model(batches[0]).sum()),
        metric_name="sum of outputs",
        logits=True,
        title="a small network",
        notes=("made in a test",),
    )
    return found, net, converted, calibrated


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


# JSON


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


def small() -> Document:
    row = sections.LayerRow(
        site="a",
        layer="BatchNorm2d",
        channels=4,
        method="group",
        changed=True,
        exact=False,
        depth=0,
        converted=0.5,
    )
    return Document(
        title="t",
        environment=Environment("cpu", "float32", 1, "2", "3"),
        normsearch="0",
        created="2026-01-01T00:00:00+00:00",
        sections=(sections.Layers(rows=(row,)),),
    )


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


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=[message[:30] for _, message in MALFORMED])
def test_malformed_json_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ReportError, match=re.escape(message)):
        Document.from_json(text)


# The page

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title><b>",
    "</svg><b>",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;&amp;",
    "javascript:alert(1)",
    "https://example.com/x.js",
    "right\u202eleft\u2066\u200f",
    "zero\u200bwidth\x00\x1b[2J",
    "very.long." * 40,
    "(",
)


def hostile() -> Document:
    names = list(HOSTILE)
    profile = Profile(1, 1.0, 0.5, 2.0, 10, Environment("cpu", "float32", 1, "2", "3"))
    rows = [
        sections.LayerRow(
            site=name,
            layer=name,
            channels=None,
            method=name,
            changed=True,
            exact=False,
            depth=number,
            converted=0.1 * number,
            calibrated=0.05 * number,
            reason=name,
            notes=(name, name),
        )
        for number, name in enumerate(names)
    ]
    dependence = BatchDependence(None, 0.0, None, None, names[0])
    return Document(
        title="".join(names),
        environment=Environment(names[0], names[1], 1, names[2], names[3]),
        normsearch=names[1],
        created=names[1],
        sections=(
            sections.Summary(
                sites=2,
                changed=1,
                methods=dict.fromkeys(names, 1),
                exact=False,
                batch_independent=False,
                parameters=(1, 2),
                batches=1,
                converted=sections.Moved(relative_l2=0.5, kl=0.1, top1_agreement=0.5),
            ),
            sections.Metric(name=names[0], original=1.0, converted=0.5),
            sections.CalibrationPart(
                before=0.1,
                after=0.05,
                steps=(sections.CalibrationStep(name=names[1], error=None, kept=True, steps=1, seconds=1.0),),
                whitened=tuple(names),
                batches=2,
                held_out=1,
            ),
            sections.Layers(rows=tuple(rows)),
            sections.HeatMap(
                methods=tuple(names),
                threshold=0.5,
                rows=tuple(
                    sections.HeatRow(
                        site=name,
                        drift=(None, None, *(0.3,) * (len(names) - 2)),
                        refused=(0,),
                        chosen=2,
                        vetoed=(3,),
                    )
                    for name in names
                ),
            ),
            sections.Gates(
                mixtures=tuple(
                    sections.Mixture(site=name, mean=(0.2, 0.3, 0.5), variance=(0.0, 0.0, 1.0))
                    for name in names
                ),
                gates=tuple(
                    sections.Gate(site=name, channels=3, mean=0.5, least=0.0, most=1.0, histogram=(1, 0, 2))
                    for name in names
                ),
            ),
            sections.Cost(before=profile, after=profile),
            sections.Dependence(before=dependence, after=dependence),
            sections.Notes(
                notes=tuple(sections.Note(text=name, about=name) for name in names),
                refusals=tuple(Refusal(name, name, name, name) for name in names),
            ),
        ),
    )


#: What has no end tag.
VOID = {"meta", "link", "input", "br", "wbr", "img"}
SVG = {"svg", "title", "desc", "line", "polyline", "circle", "rect", "text"}
ALLOWED = VOID - {"img"} | SVG | {
    *("html", "head", "style", "body", "header", "main", "footer", "nav", "section", "h1", "h2", "h3"),
    *("p", "a", "b", "bdi", "small", "span", "div", "figure", "figcaption", "fieldset", "legend", "label"),
    *("ul", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "time"),
}  # fmt: skip


class Reader(HTMLParser):
    """Reads a page, checks that every element is closed, and keeps what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")


@pytest.mark.parametrize("which", ["hostile", "made", "small"])
def test_page_is_well_formed_and_holds_no_other_elements(which: str, request: pytest.FixtureRequest) -> None:
    found = {"hostile": hostile, "small": small}.get(which, lambda: request.getfixturevalue("made")[0])()
    text = found.to_html()
    read = Reader(text)
    assert text.startswith("<!doctype html>\n")
    assert {tag for tag, _ in read.elements} <= {tag.lower() for tag in ALLOWED}
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            # No code and no style in attributes; links stay on the page.
            assert not name.startswith("on"), (tag, name)
            assert name not in ("style", "src", "srcset", "action", "formaction", "xlink:href"), (tag, name)
            if name == "href":
                assert value == "data:," or (value is not None and value[1:] in ids), value
            if name in ("aria-labelledby", "aria-describedby"):
                assert value in ids, value
    assert "{{" not in text.replace("{{ 7 * 7 }}{% raw %}", "")


def test_hostile_names_are_shown_as_they_are() -> None:
    text = hostile().to_html()
    read = "".join(Reader(text).texts)
    for name in HOSTILE:
        assert visible(name) in read.replace("\n", ""), name
    for character in "\u202e\u2066\u200f\u200b\x00\x1b":
        assert character not in text
    # The page's own URLs apart, addresses are text.
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", text)


def test_page_needs_no_network_and_allows_its_own_style_alone() -> None:
    text = hostile().to_html()
    read = Reader(text)
    (policy,) = [
        attributes["content"] for tag, attributes in read.elements if attributes.get("http-equiv") is not None
    ]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert not re.search(r"@import|url\(|expression|@font-face", style)


def test_page_is_for_everybody() -> None:
    elements = Reader(hostile().to_html()).elements
    tags = [tag for tag, _ in elements]
    assert [tags.count(tag) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
    assert ("html", {"lang": "en"}) in elements
    for number, (tag, attributes) in enumerate(elements):
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img"
            assert [t for t, _ in elements[number + 1 : number + 3]] == ["title", "desc"]
        if attributes.get("class", "") is not None and "scroll" in (attributes.get("class") or "").split():
            # What scrolls can be reached with the keyboard, and has a name.
            assert attributes["tabindex"] == "0"
            assert "aria-labelledby" in attributes


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio of two colours."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_and_dark() -> None:
    style = re.findall(r"<style>(.*?)</style>", small().to_html(), re.DOTALL)[0]
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        pairs = [(f"t{n}", f"h{n}") for n in range(len(page.HEAT) + 1)]
        for text in ("text", "muted", "accent"):
            pairs += [(text, ground) for ground in ("page", "panel", "band")]
        pairs += [("muted", "refused"), ("muted", "refused-line")]
        for text, ground in pairs:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, colours[text])
        # Lines, bars and frames: 3 is enough.
        for mark in ("s0", "s1", "p0", "p1", "p2"):
            assert contrast(colours[mark], colours["panel"]) >= 3, mark
        for number in range(len(page.HEAT) + 1):
            assert contrast(colours["frame"], colours["panel"]) >= 3, number


def test_five_hundred_sites_stay_small_and_filterable() -> None:
    row = small().sections[0].rows[0]  # type: ignore[union-attr]
    rows = tuple(
        replace(row, site=f"stage.{n // 10}.norm{n}", depth=n, converted=n / 500) for n in range(500)
    )
    text = replace(small(), sections=(sections.Layers(rows=rows),)).to_html()
    assert len(text) < 500_000
    classes = [attributes.get("class") for tag, attributes in Reader(text).elements if tag == "tr"]
    assert sum("drifted" in (c or "") for c in classes) == 449
    assert 'id="rows-drifted"' in text
    assert ":has(#rows-drifted:checked)" in text


# Charts and words


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def test_depth_chart_puts_values_where_they_belong() -> None:
    points = [charts.Point(f"a.{n}", (n / 4, None if n == 1 else 0.1)) for n in range(5)]
    svg = parse(charts.depth_chart(points, ["before", "after"], width=1040, label="drift"))
    dots = [c for c in svg.iter("circle") if c.get("class") == "dot s0"]
    x, y = ([float(dot.get(name, "")) for dot in dots] for name in ("cx", "cy"))
    steps = [b - a for a, b in pairwise(x)]
    assert steps == pytest.approx([steps[0]] * 4, abs=1e-2)
    rises = [a - b for a, b in pairwise(y)]
    assert rises == pytest.approx([rises[0]] * 4, abs=1e-2)
    # Linear from 0: the first value stands on the axis.
    grid = [float(line.get("y1", "")) for line in svg.iter("line")]
    assert y[0] == pytest.approx(max(grid))
    assert y[4] == pytest.approx(min(grid))
    assert len([c for c in svg.iter("circle") if c.get("class") == "dot s1"]) == 4
    assert [dot[0].text for dot in dots][1] == "a.1: 25.0 % before"
    said = svg.find("desc")
    assert said is not None
    assert "before: 0 % at the first site, 100 % at the last, at most 100 % at a.4" in (said.text or "")


def test_depth_chart_is_logarithmic_where_one_site_hides_the_others() -> None:
    points = [charts.Point("a", (value,)) for value in (0.01, 0.01, 0.1, 0.01, 100.0)]
    svg = parse(charts.depth_chart(points, ["before"], width=400, label="drift"))
    y = [float(dot.get("cy", "")) for dot in svg.iter("circle")]
    assert (y[0] - y[4]) / (y[0] - y[2]) == pytest.approx(4, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6) | st.none(), min_size=1, max_size=30))
def test_depth_chart_never_leaves_its_frame(values: list[float | None]) -> None:
    points = [charts.Point(f"block{n % 3}.{n}", (value,)) for n, value in enumerate(values)]
    svg = parse(charts.depth_chart(points, ["before"], width=358, label="drift"))
    for dot in svg.iter("circle"):
        assert 0 <= float(dot.get("cx", "")) <= 358
        assert 29 <= float(dot.get("cy", "")) <= 267


def test_bars_and_histograms_add_up() -> None:
    svg = parse(charts.stacked_bar((0.2, 0.3, 0.5), ("a", "b", "c"), "label"))
    widths = [float(rect.get("width", "")) for rect in svg.iter("rect")]
    assert widths == pytest.approx([36, 54, 90])
    svg = parse(charts.histogram((4, 0, 1), "label"))
    heights = [float(rect.get("height", "")) for rect in svg.iter("rect")]
    assert heights == pytest.approx([30, 0, 7.5])


def test_blocks_are_cut_by_as_few_parts_as_tell_them_apart() -> None:
    assert charts.blocks(["bn1", "layer1.0.a", "layer1.1.b", "layer2.0"]) == [
        ("bn1", 1),
        ("layer1", 2),
        ("layer2", 1),
    ]
    assert charts.blocks(["features.0.a", "features.0.b", "features.1.a", "features.2.c"]) == [
        ("features.0", 2),
        ("features.1", 1),
        ("features.2", 1),
    ]


def test_largest_steps_are_those_of_changed_sites() -> None:
    row = small().sections[0].rows[0]  # type: ignore[union-attr]
    drifts = (0.1, 0.15, 0.5, 0.45, 0.9)
    rows = tuple(
        replace(row, site=str(n), depth=n, converted=drift, changed=n != 4) for n, drift in enumerate(drifts)
    )
    found = page.largest_steps(sections.Layers(rows=rows))
    assert [(r.site, round(step, 9)) for r, step in found] == [("2", 0.35), ("0", 0.1), ("1", 0.05)]


@given(st.floats(-1e9, 1e9))
def test_percentages_are_within_their_digits(value: float) -> None:
    text = percent(value)
    if text == "< 0.01 %":
        assert 0 < value < 1e-4
        return
    shown = float(text.removesuffix(" %").replace(",", ""))
    assert shown == pytest.approx(100 * value, rel=6e-3, abs=6e-3)


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars"),
)


def browse(path: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *options, path.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_browser_finds_nothing_to_complain_about(
    made: tuple[Document, nn.Module, nn.Module, nn.Module], tmp_path: Path
) -> None:
    for name, found in (("hostile", hostile()), ("made", made[0])):
        page_file = tmp_path / f"{name}.html"
        page_file.write_text(found.to_html(), "utf-8")
        done = browse(page_file, tmp_path / "profile", "--dump-dom")
        assert messages(done) == []
        assert "</html>" in done.stdout
    # What the policy forbids would be heard of.
    forbidden = (
        (tmp_path / "made.html").read_text("utf-8").replace("</body>", "<script>alert(1)</script></body>")
    )
    (tmp_path / "forbidden.html").write_text(forbidden, "utf-8")
    assert "Content Security Policy" in "".join(
        messages(browse(tmp_path / "forbidden.html", tmp_path / "profile", "--dump-dom"))
    )


#: Frames of given widths, since a window has a least one; the title tells each one's and its content's.
_FRAMES = """<!doctype html><title></title>{frames}
<script>
addEventListener("load", () => {{
  const widths = [...document.querySelectorAll("iframe")].map(frame =>
    [frame.contentWindow.innerWidth, frame.contentDocument.documentElement.scrollWidth]);
  document.title = JSON.stringify(widths);
}});
</script>"""


def width_of_frames(pages: Sequence[tuple[int, str]], folder: Path) -> list[tuple[int, int]]:
    """Return the inner width of a frame for each page, and that of the page in it."""
    frames = []
    for width, text in pages:
        # Without its policy, under which no style in an attribute counts.
        source = escape(re.sub(r"<meta http-equiv=[^>]*>", "", text))
        frames.append(f'<iframe width="{width}" height="900" style="border:0" srcdoc="{source}"></iframe>')
    (folder / "x.html").write_text(_FRAMES.format(frames="".join(frames)), "utf-8")
    done = browse(folder / "x.html", folder / "profile", "--window-size=1400,1000", "--dump-dom")
    (title,) = re.findall(r"<title>(\[.*?\])</title>", done.stdout)
    return [(inner, content) for inner, content in json.loads(title)]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
def test_page_never_scrolls_sideways(
    made: tuple[Document, nn.Module, nn.Module, nn.Module], tmp_path: Path
) -> None:
    wide = '<div style="width: 2000px">too wide</div></main>'
    pages = (
        (hostile().to_html(), True),
        (made[0].to_html(), True),
        (made[0].to_html().replace("</main>", wide), False),
    )
    cases = [(width, text, fits) for width in (320, 390, 768, 1280) for text, fits in pages]
    found = width_of_frames([(width, text) for width, text, _ in cases], tmp_path)
    for (width, _, fits), (inner, content) in zip(cases, found, strict=True):
        assert inner == width
        assert (content <= inner) == fits


def test_sparse_mixtures_are_shown_as_they_are_used() -> None:
    converted = normsearch.convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), {"1": "sparse_switchable(steps=1)"}
    )
    converted(torch.randn(2, 3, 6, 6))
    found = gates_of(converted, ["1"])
    assert found is not None
    assert found.mixtures[0].mean == found.mixtures[0].variance
    assert sorted(found.mixtures[0].mean) == [0, 0, 1]
