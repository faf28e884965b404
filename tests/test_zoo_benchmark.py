"""The zoo benchmark can fail: what it counts by itself, what it keeps between runs, what its page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import normsearch
from benchmarks.zoo.checks import BATCH, SPELLINGS, judged, planned
from benchmarks.zoo.counts import summary
from benchmarks.zoo.models import ZOO, Model, images
from benchmarks.zoo.page import page
from benchmarks.zoo.probes import batch_norms, distance, norm_at, tells_samples_apart
from benchmarks.zoo.runs import Results, examined
from benchmarks.zoo.verdicts import alive, complete, exact, problems
from normsearch import METHODS


class Network(nn.Module):
    """One layer of each kind that other tools miss, and an auxiliary call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fused, self.frozen = BatchNormAct2d(8), FrozenBatchNorm2d(8)
        self.pool, self.plain = nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)
        self.calls = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.fused(self.conv(x)))
        if self.calls:
            x = F.batch_norm(x, None, None, training=True)
        return self.plain(self.pool(x))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    model = Network().double().eval()
    model.plain.running_mean.normal_()
    return model


ENTRY = Model(name="test", build=Network, inputs=images(8))
INPUTS = ENTRY.inputs(BATCH, {"dtype": torch.float64})
PATHS = {"fused", "frozen", "plain"}


def test_counts_every_kind_of_batch_norm_and_none_of_ours(model: Network) -> None:
    assert set(batch_norms(model)) == PATHS
    assert batch_norms(normsearch.convert(model, "frozen")) == {}
    assert type(norm_at(normsearch.convert(model, "group"), "fused")) is nn.GroupNorm


def test_what_is_left_is_found(model: Network) -> None:
    outcome, _ = judged(ENTRY, model, INPUTS, PATHS, PATHS)
    assert outcome["left"] == sorted(PATHS)
    assert not complete(outcome)
    converted = normsearch.convert(model, "frozen")
    assert complete(judged(ENTRY, converted, INPUTS, PATHS, PATHS)[0])
    # A layer that was to stay and is gone is as wrong.
    assert judged(ENTRY, converted, INPUTS, PATHS, PATHS - {"plain"})[0]["left"] == ["plain"]
    converted.calls = True
    assert judged(ENTRY, converted, INPUTS, PATHS, PATHS)[0]["calling"] == ["Network"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dead_layers_are_found(model: Network, device: str) -> None:
    converted = normsearch.convert(model, "frozen")
    converted.plain = nn.GroupNorm(8, 8).double()
    entry = Model(name="test", build=Network, inputs=images(8), meta=device == "meta")
    outcome, _ = judged(entry, converted.to(device), INPUTS.to(device), PATHS, PATHS)
    assert outcome["dead"] == ["plain"]
    assert not alive(outcome)
    alone, _ = judged(entry, normsearch.convert(model.to(device), "layer"), INPUTS.to(device), PATHS, PATHS)
    assert alone["dead"] == []
    assert alive(alone)


def test_outputs_are_compared() -> None:
    one = [torch.ones(2, 3), torch.arange(4.0)]
    assert distance(one, one) == 0
    assert distance([one[0] * 1.1, one[1] * 1.1], one) == pytest.approx(0.1)
    assert distance(one[:1], one) == float("inf")
    assert not tells_samples_apart([torch.ones(2, 3)])
    assert tells_samples_apart([torch.tensor([[1.0], [1.001]])])
    assert not exact({"error": 2e-10})
    assert exact({"error": 9e-11})


def test_every_registered_method_is_tried(model: Network) -> None:
    assert {normsearch.parse_method(spelling).name for spelling in SPELLINGS} == set(METHODS)
    sites = normsearch.find_sites(model, INPUTS)
    for spelling in SPELLINGS:
        planned_here = planned(sites, [spelling] * len(sites))
        asked = normsearch.explain(model, [spelling, "batch"], inputs=INPUTS)
        assert dict(planned_here) == {row.site.path: row.method for row in asked.rows}, spelling
        refused = {row.site.path for row in planned_here.rows if row.refusals}
        assert refused == {row.site.path for row in asked.rows if row.refusals}, spelling


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 220
    assert sum(not entry.meta for entry in ZOO.values()) >= 70


def _record(**changes: Any) -> dict[str, Any]:
    outcome = {"left": [], "calling": [], "dead": [], "changed": 3, "refused": {}, "error": 0.0}
    graph = {"traced": True, "sites": 3, "functional": 1, "otherwise": 0, "structure": [], "error": 0.0}
    record = {
        "name": "a/network",
        "meta": False,
        "batch_norms": 3,
        "methods": {"group": outcome, "weight": outcome | {"refused": {"for a reason": ["here"]}}},
        "opacus": outcome | {"left": ["x", "y"]},
        "graphs": {"eval": graph, "train": {"traced": False, "why": "TraceError"}},
    }
    return record | changes


def test_a_run_goes_on_with_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lines"
    results = Results(path, "this")
    results.add(_record())
    results.add({"name": "failed", "failed": "MemoryError"})
    assert set(Results(path, "this").records) == {"a/network"}
    # Sources have changed since; a line was cut off.
    assert Results(path, "other").records == {}
    path.write_text(path.read_text() + '\n{"name": "cut')
    results = Results(path, "this")
    results.add(_record(name="another"))
    assert set(Results(path, "this").records) == {"a/network", "another"}
    assert Results(path, "this", fresh=True).records == {}


def test_page_and_summary_say_what_was_found() -> None:
    bad = _record()["methods"]["group"]
    records = [_record(), _record(name="b", methods={"group": bad | {"dead": ["n"]}, "weight": bad})]
    document = summary(records, {"torch": "1"})
    assert json.loads(json.dumps(document)) == document
    assert document["methods"]["group"]["alive"] == 1
    assert document["methods"]["weight"]["reasons"] == {"for a reason": [1, 1]}
    assert document["opacus"] == {
        "complete and alive": 0,
        "BatchNorm left": 2,
        "dead layers": 0,
        "failed": 0,
        "layers left": 4,
    }
    assert document["graphs"]["eval"]["equal"] == 2
    assert document["graphs"]["train"]["not traced"] == {"TraceError": 2}
    assert document["problems"] == ["b: group: not alive: constant: n"]
    text = page(records, document, 2)
    assert "Not complete" not in text
    assert "1 of the zoo's 3 networks" in page(records, document, 3)
    assert "- b: group: not alive: constant: n" in text
    assert "| a/network | 3 | ≈ | = −1 | 2 left | equal, not traced |" in text
    assert "| b | 3 | **!** | = | 2 left | equal, not traced |" in text


def test_everything_that_can_be_wrong_is_a_problem() -> None:
    good = _record()
    assert problems(good) == []
    assert problems({"name": "x"}) == ["x: not examined yet"]
    assert problems({"name": "x", "failed": "MemoryError"}) == ["x: MemoryError"]
    for key, value in {
        "left": ["n"],
        "calling": ["Conv"],
        "dead": ["n"],
        "finite": False,
        "depends": False,
        "error": 1e-9,
        "failed": "ValueError",
    }.items():
        outcome = good["methods"]["group"] | {key: value}
        assert len(problems(good | {"methods": {"group": outcome}})) == 1, key
    for key, value in {"structure": ["w"], "error": 1e-11, "failed": "ValueError"}.items():
        graph = good["graphs"]["eval"] | {key: value}
        assert len(problems(good | {"graphs": {"eval": graph}})) == 1, key


def test_what_fades_by_design_is_told_apart_from_what_is_dead() -> None:
    faded = _record()["methods"]["group"] | {"depends": False}
    assert problems(_record(methods={"spectral(gain=fixed)": faded, "instance": faded})) == []
    assert len(problems(_record(methods={"spectral(gain=fixed)": faded | {"dead": ["n"]}}))) == 1
    assert len(problems(_record(methods={"spectral": faded}))) == 1


@pytest.mark.slow
def test_a_process_that_dies_is_a_result() -> None:
    found = dict(examined(["no/such network", "timm/test_efficientnet"], jobs=1))
    assert found["no/such network"]["failed"].startswith("KeyError")
    assert problems(found["timm/test_efficientnet"]) == []
