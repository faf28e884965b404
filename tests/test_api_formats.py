"""Exported programs and ONNX files over HTTP: what comes of them is what the library makes of them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_of_tests import digits
from serving import bearer, served
from starlette.testclient import TestClient
from test_api_jobs import artifacts, ended, posted, uploaded

import normsearch
from api import engine
from api.tasks import Source
from normsearch.reporting import CalibrationPart, Dependence, Document, HeatMap, Layers, Metric, Summary

onnx = pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'"
)

import onnx_attacks  # noqa: E402
import onnx_networks  # noqa: E402
import program_attacks  # noqa: E402

from normsearch import onnx_graph  # noqa: E402

LABELS = np.arange(60, dtype=np.int64) % 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with served(folder, requests_per_minute=1_000_000, children=2) as asking:
        asking.headers.update(bearer(asking))
        yield asking
        text = asking.get("/metrics").text
        assert not [line for line in text.splitlines() if 'status="5' in line]


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = digits()
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.randn(16, 1, 8, 8) * 2 + 1)
    return model.eval()


@pytest.fixture(scope="module")
def program(network: torch.nn.Module, folder: Path) -> Path:
    normsearch.export(network, folder / "digits.pt2", torch.randn(4, 1, 8, 8))
    return folder / "digits.pt2"


@pytest.fixture(scope="module")
def graph(folder: Path) -> Path:
    twin = onnx_networks.Twin().eval()
    (folder / "twin.onnx").write_bytes(onnx_networks.proto(twin, "initializers", 17).SerializeToString())
    return folder / "twin.onnx"


def _read(client: TestClient, path: Path, name: str | None = None) -> dict[str, Any]:
    upload = uploaded(client, name or path.name, path.read_bytes())
    made = client.post("/v1/models", json={"upload": upload})
    assert made.status_code == 201, made.text
    found: dict[str, Any] = made.json()
    return found


def _dataset(client: TestClient, name: str, **arrays: Any) -> str:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    targets = {"targets": "labels"} if "labels" in arrays else {}
    upload = uploaded(client, name, buffer.getvalue())
    made = client.post("/v1/datasets", json={"upload": upload, **targets})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


@pytest.fixture(scope="module")
def grey() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(1, 2, (60, 1, 8, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def colour() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(0, 1, (60, 3, 8, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def digits_data(client: TestClient, grey: torch.Tensor) -> str:
    return _dataset(client, "grey.npz", x=grey.numpy(), labels=LABELS)


@pytest.fixture(scope="module")
def twin_data(client: TestClient, colour: torch.Tensor) -> str:
    return _dataset(client, "colour.npz", x=colour.numpy(), labels=LABELS)


@pytest.fixture(scope="module")
def program_model(client: TestClient, program: Path) -> dict[str, Any]:
    return _read(client, program)


@pytest.fixture(scope="module")
def graph_model(client: TestClient, graph: Path) -> dict[str, Any]:
    return _read(client, graph)


def _outputs(content: bytes, inputs: torch.Tensor) -> torch.Tensor:
    """What torch alone makes of a program's file."""
    with torch.no_grad():
        found: torch.Tensor = torch.export.load(io.BytesIO(content)).module()(inputs)
    return found


def _run(content: bytes, inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    """What onnxruntime makes of an ONNX file."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"x": inputs.numpy()})[0]
    return found


class TestModels:
    def test_a_program_is_described(self, program_model: dict[str, Any], network: torch.nn.Module) -> None:
        assert program_model["format"] == "exported program"
        assert (program_model["architecture"], program_model["arguments"]) == (None, {})
        assert program_model["parameters"] == sum(one.numel() for one in network.parameters())
        assert (program_model["sites"], program_model["converted"]) == (2, False)
        (given,) = program_model["inputs"]
        assert (given["dtype"], given["shape"]) == ("float32", [None, 1, 8, 8])

    def test_an_onnx_file_is_described(self, graph_model: dict[str, Any]) -> None:
        assert graph_model["format"] == "onnx"
        assert (graph_model["architecture"], graph_model["sites"]) == (None, 4)
        assert graph_model["inputs"] == [{"name": "x", "dtype": "float32", "shape": [None, 3, 8, 8]}]

    def test_sites_are_the_librarys(
        self,
        client: TestClient,
        program_model: dict[str, Any],
        graph_model: dict[str, Any],
        program: Path,
        graph: Path,
    ) -> None:
        for model, sites in (
            (program_model, normsearch.find_sites(normsearch.load(program).model)),
            (graph_model, onnx_graph.find_sites(graph)),
        ):
            found = client.get(f"/v1/models/{model['id']}/sites").json()["items"]
            assert [one["path"] for one in found] == [site.path for site in sites]
            assert [one["input_shapes"] for one in found] == [
                [list(s) for s in t.input_shapes] for t in sites
            ]

    def test_suffixes_are_known_in_capitals(self, client: TestClient, graph: Path) -> None:
        assert _read(client, graph, "TWIN.ONNX")["filename"] == "TWIN.ONNX"

    @pytest.mark.parametrize("kind", ["program", "graph"])
    def test_an_architecture_is_refused(
        self, client: TestClient, kind: str, request: pytest.FixtureRequest
    ) -> None:
        path: Path = request.getfixturevalue(kind)
        upload = uploaded(client, path.name, path.read_bytes())
        for given in ({"architecture": "torchvision/resnet18"}, {"entry": "ema"}, {"arguments": {"a": 1}}):
            refused = client.post("/v1/models", json={"upload": upload, **given})
            assert refused.status_code == 422, refused.text
            assert "says itself what its network is" in refused.json()["detail"]
        form = {"architecture": "torchvision/resnet18", "to": "group"}
        refused = client.post("/v1/convert", data=form, files={"file": (path.name, path.read_bytes())})
        assert refused.status_code == 422
        assert refused.json()["type"] == "/problems/refused"

    def test_without_the_extra_the_reason_is_said(self, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "api.engine.onnx_networks", raising=False)
        monkeypatch.setitem(sys.modules, "onnx_ir", None)
        asked = Source(file=graph.name).model_dump_json().encode()
        made = engine.run("inspect", asked, graph.parent, lambda _: None)
        assert isinstance(made, engine.Failed)
        assert made.error == "CheckpointError"
        assert "needs onnx_ir, and this service does not have it" in made.detail
        assert "normsearch[onnx]" in made.detail


class TestConvert:
    """One call: a file in, the rewritten one out."""

    def test_a_program(self, client: TestClient, program: Path, grey: torch.Tensor) -> None:
        content = program.read_bytes()
        answer = client.post("/v1/convert", data={"to": "group"}, files={"file": (program.name, content)})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/octet-stream"
        assert 'filename="digits-converted.pt2"' in answer.headers["content-disposition"]
        names = [part.split('title="')[1].rstrip('"') for part in answer.headers["link"].split(", ")]
        assert names == ["digits-plan.json", "digits-report.json", "digits-report.html"]
        expected = normsearch.convert(normsearch.load(program).model, "group")
        with torch.no_grad():
            assert torch.equal(_outputs(answer.content, grey), expected.module()(grey))
        found = torch.export.load(io.BytesIO(answer.content))
        targets = {str(node.target) for node in found.graph.nodes if node.op == "call_function"}
        assert {target.partition(".")[0] for target in targets} == {"aten"}
        # It says how it was converted, and is no original any more.
        again = _read_bytes(client, "again.pt2", answer.content)
        assert again["converted"] is True
        job = ended(client, posted(client, "/v1/conversions", {"model": again["id"], "to": "layer"}))
        assert "converted already" in job["problem"]["detail"]

    def test_an_onnx_file(self, client: TestClient, graph: Path, tmp_path: Path) -> None:
        content = graph.read_bytes()
        answer = client.post("/v1/convert", data={"to": "group"}, files={"file": (graph.name, content)})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/octet-stream"
        assert 'filename="twin-converted.onnx"' in answer.headers["content-disposition"]
        names = [part.split('title="')[1].rstrip('"') for part in answer.headers["link"].split(", ")]
        assert names == ["twin-plan.json", "twin-report.json", "twin-report.html"]
        onnx_graph.save(onnx_graph.convert(graph, "group"), tmp_path / "expected.onnx")
        assert answer.content == (tmp_path / "expected.onnx").read_bytes()
        assert _run(answer.content, torch.randn(3, 3, 8, 8)).shape == (3, 32)

    @pytest.mark.parametrize(("name", "to"), [("graph", "nothing=group"), ("program", "groop")])
    def test_refusals_are_problems(
        self, client: TestClient, name: str, to: str, request: pytest.FixtureRequest
    ) -> None:
        path: Path = request.getfixturevalue(name)
        refused = client.post("/v1/convert", data={"to": to}, files={"file": (path.name, path.read_bytes())})
        assert refused.status_code == 422
        assert refused.json()["error"] in ("PlanError", "MethodError")

    @pytest.mark.slow
    def test_results_need_neither_normsearch_nor_what_made_them(
        self, client: TestClient, program: Path, graph: Path, tmp_path: Path
    ) -> None:
        for path in (program, graph):
            answer = client.post(
                "/v1/convert", data={"to": "group"}, files={"file": (path.name, path.read_bytes())}
            )
            assert answer.status_code == 200, answer.text
            (tmp_path / path.name).write_bytes(answer.content)
        code = (
            "import sys, torch, numpy, onnxruntime\n"
            "model = torch.export.load('digits.pt2').module()\n"
            "print(tuple(model(torch.ones(5, 1, 8, 8)).shape))\n"
            "session = onnxruntime.InferenceSession('twin.onnx')\n"
            "print(session.run(None, {'x': numpy.ones((5, 3, 8, 8), 'float32')})[0].shape)\n"
            "assert not any(name.startswith('normsearch') for name in sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.split("\n")[:2] == ["(5, 10)", "(5, 32)"]


def _read_bytes(client: TestClient, name: str, content: bytes) -> dict[str, Any]:
    made = client.post("/v1/models", json={"upload": uploaded(client, name, content)})
    assert made.status_code == 201, made.text
    found: dict[str, Any] = made.json()
    return found


class TestPlans:
    def test_are_the_librarys(
        self, client: TestClient, program_model: dict[str, Any], graph_model: dict[str, Any], graph: Path
    ) -> None:
        for model, first in ((program_model, "1"), (graph_model, "bn1")):
            to = {first: "instance", "*": ["identity", "group"]}
            found = client.post("/v1/plans", json={"model": model["id"], "to": to})
            assert found.status_code == 200, found.text
            assert found.json()["refused"] == 0
            assert found.json()["rows"][0]["method"] == "instance"
        plan = onnx_graph.plan(graph, to)
        assert found.json()["plan"] == json.loads(plan.to_json())

    def test_choices_know_the_order_of_the_data(
        self, client: TestClient, program_model: dict[str, Any], graph_model: dict[str, Any], graph: Path
    ) -> None:
        for model, order in ((program_model, ["1", "4"]), (graph_model, ["bn1", "bn2", "bn3", "bn4"])):
            found = client.post("/v1/plans/choices", json={"model": model["id"]})
            assert found.status_code == 200, found.text
            assert found.json()["order"] == order
            assert found.json()["methods"] == list(normsearch.METHODS)
        for number, name in enumerate(found.json()["methods"]):
            explained = onnx_graph.explain(graph, name)
            for row, cells in zip(explained.rows, found.json()["choices"], strict=True):
                assert cells[number]["method"] == (None if row.method is None else str(row.method))
                assert row.method is None or tuple(cells[number]["notes"]) == row.notes


@pytest.fixture(scope="module")
def program_job(client: TestClient, program_model: dict[str, Any], digits_data: str) -> dict[str, Any]:
    body = {"model": program_model["id"], "to": "instance", "dataset": digits_data}
    return ended(client, posted(client, "/v1/conversions", body))


@pytest.fixture(scope="module")
def graph_job(client: TestClient, graph_model: dict[str, Any], twin_data: str) -> dict[str, Any]:
    body = {"model": graph_model["id"], "to": "group", "dataset": twin_data}
    return ended(client, posted(client, "/v1/conversions", body))


class TestConversions:
    def test_of_a_program_is_the_librarys(
        self, client: TestClient, program_job: dict[str, Any], program: Path, grey: torch.Tensor
    ) -> None:
        made = artifacts(client, program_job)
        assert set(made) == {"weights", "plan", "report", "page"}
        original = normsearch.load(program).model
        expected = normsearch.convert(original, "instance")
        with torch.no_grad():
            assert torch.equal(_outputs(made["weights"], grey), expected.module()(grey))
        report = Document.from_json(made["report"])
        assert report.title == "digits.pt2"
        drift = normsearch.compare(original, expected, grey.split(16), logits=True).drift
        summary, metric = report.section(Summary), report.section(Metric)
        assert summary is not None
        assert summary.converted is not None
        assert summary.converted.relative_l2 == pytest.approx(drift.relative_l2, rel=1e-4)
        assert metric is not None
        assert metric.original == pytest.approx(_accuracy(original.module()(grey)), abs=1e-6)

    def test_of_an_onnx_file_is_the_librarys(
        self, client: TestClient, graph_job: dict[str, Any], graph: Path, colour: torch.Tensor, tmp_path: Path
    ) -> None:
        made = artifacts(client, graph_job)
        assert set(made) == {"weights", "plan", "report", "page"}
        plan = onnx_graph.plan(graph, "group")
        converted = onnx_graph.convert(graph, plan)
        onnx_graph.save(converted, tmp_path / "expected.onnx")
        assert made["weights"] == (tmp_path / "expected.onnx").read_bytes()
        assert normsearch.Plan.from_json(made["plan"])["bn1"] == plan["bn1"]
        report = Document.from_json(made["report"])
        compared = onnx_graph.compare(graph, converted, colour.split(16), logits=True)
        summary, layers, metric, dependence = (
            report.section(kind) for kind in (Summary, Layers, Metric, Dependence)
        )
        assert isinstance(summary, Summary)
        assert summary.converted is not None
        assert summary.converted.relative_l2 == pytest.approx(compared.drift.relative_l2, rel=1e-4)
        assert summary.parameters == (compared.parameters.before, compared.parameters.after)
        assert isinstance(layers, Layers)
        assert [row.site for row in layers.rows] == ["bn1", "bn2", "bn3", "bn4"]
        assert [row.depth for row in layers.rows] == [0, 1, 2, 3]
        # The last site is the output.
        assert layers.rows[3].converted == pytest.approx(compared.drift.relative_l2, rel=1e-4)
        assert isinstance(metric, Metric)
        expected = _accuracy(torch.from_numpy(_run(made["weights"], colour)))
        assert metric.converted == pytest.approx(expected, abs=1e-6)
        assert isinstance(dependence, Dependence)
        assert dependence.after.eval_batches == pytest.approx(0, abs=1e-6)
        assert b"<html" in made["page"]

    def test_a_plan_for_the_network_fits_its_program(
        self, client: TestClient, program_model: dict[str, Any], network: torch.nn.Module
    ) -> None:
        plan = json.loads(normsearch.plan(network, {"1": "layer", "*": "group"}).to_json())
        job = ended(client, posted(client, "/v1/conversions", {"model": program_model["id"], "plan": plan}))
        assert json.loads(artifacts(client, job)["plan"]) == plan

    @pytest.mark.parametrize("name", ["fixed.pt2", "fixed.onnx"])
    def test_files_for_one_batch_size_are_measured_with_it(
        self, client: TestClient, name: str, network: torch.nn.Module, tmp_path: Path
    ) -> None:
        if name.endswith(".pt2"):
            made = torch.export.export(network, (torch.randn(4, 1, 8, 8),))
            torch.export.save(made, tmp_path / name)
            shape = (1, 8, 8)
        else:
            proto = onnx_networks.proto(onnx_networks.Twin().eval(), "initializers", 17)
            for value in (*proto.graph.input, *proto.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = 4
            (tmp_path / name).write_bytes(proto.SerializeToString())
            shape = (3, 8, 8)
        model = _read(client, tmp_path / name)
        assert model["inputs"][0]["shape"] == [4, *shape]
        dataset = _dataset(client, f"{name}.npz", x=np.ones((11, *shape), np.float32) * 0.5)
        for inputs in ({"dataset": dataset}, {"input_shape": "x".join(map(str, shape))}):
            body = {"model": model["id"], "to": "group", **inputs}
            assert client.post("/v1/plans/choices", json={"model": model["id"], **inputs}).status_code == 200
            job = ended(client, posted(client, "/v1/conversions", body))
            found = Document.from_json(artifacts(client, job)["report"])
            summary, dependence = found.section(Summary), found.section(Dependence)
            assert summary is not None
            assert summary.batches == (2 if "dataset" in inputs else 1)
            assert dependence is not None
        few = _dataset(client, f"few-{name}.npz", x=np.ones((3, *shape), np.float32))
        job = ended(client, posted(client, "/v1/conversions", {**body, "input_shape": None, "dataset": few}))
        assert "exported for batches of 4" in job["problem"]["detail"]


def _accuracy(outputs: torch.Tensor) -> float:
    return float((outputs.argmax(1) == torch.from_numpy(LABELS)).double().mean())


class TestCalibrations:
    def test_of_a_program_is_the_librarys(
        self,
        client: TestClient,
        program_job: dict[str, Any],
        digits_data: str,
        program: Path,
        grey: torch.Tensor,
    ) -> None:
        weights = program_job["result"]["artifacts"][0]
        body = {"weights": weights, "dataset": digits_data, "budget": 6, "batch_size": 10}
        job = ended(client, posted(client, "/v1/calibrations", body))
        made = artifacts(client, job)
        assert set(made) == {"weights", "plan", "report", "page"}
        original = normsearch.load(program).model
        torch.set_num_threads(1)
        calibrated = normsearch.calibrate(
            normsearch.convert(original, "instance"), original, list(grey.split(10)), budget=6
        )
        with torch.no_grad():
            expected = calibrated.module()(grey)
        torch.testing.assert_close(_outputs(made["weights"], grey), expected, rtol=1e-3, atol=1e-3)
        record = normsearch.calibration_record(calibrated)
        assert record is not None
        assert job["result"]["after"] == pytest.approx(record.error.after, rel=1e-3)
        assert job["result"]["after"] < job["result"]["before"]

    def test_of_an_onnx_file_is_the_librarys(
        self, client: TestClient, graph_job: dict[str, Any], twin_data: str, graph: Path, colour: torch.Tensor
    ) -> None:
        weights = graph_job["result"]["artifacts"][0]
        body = {"weights": weights, "dataset": twin_data, "batch_size": 10}
        job = ended(client, posted(client, "/v1/calibrations", body))
        made = artifacts(client, job)
        assert set(made) == {"weights", "plan", "report", "page"}
        calibrated = onnx_graph.calibrate(onnx_graph.convert(graph, "group"), graph, list(colour.split(10)))
        record = onnx_graph.calibration_record(calibrated)
        assert record is not None
        assert job["result"]["before"] == pytest.approx(record.error.before, rel=1e-4)
        assert job["result"]["after"] == pytest.approx(record.error.after, rel=1e-3)
        assert [rung["name"] for rung in job["result"]["rungs"]] == [rung.name for rung in record.rungs]
        expected = _run(onnx_graph_bytes(calibrated), colour)
        np.testing.assert_allclose(_run(made["weights"], colour), expected, rtol=1e-3, atol=1e-3)
        assert Document.from_json(made["report"]).section(CalibrationPart) is not None
        assert json.loads(made["plan"]) == json.loads(artifacts(client, graph_job)["plan"])

    def test_what_an_onnx_file_does_not_take_is_refused(
        self, client: TestClient, graph_job: dict[str, Any], twin_data: str
    ) -> None:
        weights = graph_job["result"]["artifacts"][0]
        body = {"weights": weights, "dataset": twin_data, "parameters": "affine"}
        refused = client.post("/v1/calibrations", json=body)
        assert refused.status_code == 422
        assert "leave parameters out" in refused.json()["detail"]

    def test_a_deleted_plan_costs_the_report_alone(
        self, client: TestClient, graph_model: dict[str, Any], twin_data: str
    ) -> None:
        body = {"model": graph_model["id"], "to": "layer"}
        job = ended(client, posted(client, "/v1/conversions", body))
        weights, plan, *_ = job["result"]["artifacts"]
        assert client.delete(f"/v1/artifacts/{plan}").status_code == 204
        body = {"weights": weights, "dataset": twin_data, "batch_size": 30}
        job = ended(client, posted(client, "/v1/calibrations", body))
        assert set(artifacts(client, job)) == {"weights"}
        assert any("plan of the conversion was deleted" in note for note in job["result"]["notes"])


def onnx_graph_bytes(model: Any) -> bytes:
    from normsearch.onnx_graph.files import as_proto

    return bytes(as_proto(model).SerializeToString())


def test_sensitivity_of_a_program_is_the_librarys(
    client: TestClient, program_model: dict[str, Any], digits_data: str, program: Path, grey: torch.Tensor
) -> None:
    body = {
        "model": program_model["id"],
        "dataset": digits_data,
        "methods": ["group", "instance"],
        "batch_size": 30,
    }
    job = ended(client, posted(client, "/v1/sensitivities", body))
    found = json.loads(artifacts(client, job)["sensitivity"])
    expected = normsearch.sensitivity(normsearch.load(program).model, ["group", "instance"], grey.split(30))
    assert job["result"]["sites"] == 2
    for site, row in expected.drift.items():
        for method, drift in row.items():
            assert found["drift"][site][method] == pytest.approx(drift, rel=1e-4)


def test_sensitivity_of_a_graph_is_the_librarys(
    client: TestClient, graph_model: dict[str, Any], twin_data: str, graph: Path, colour: torch.Tensor
) -> None:
    body = {"model": graph_model["id"], "dataset": twin_data, "methods": ["group", "instance"]}
    job = ended(client, posted(client, "/v1/sensitivities", body))
    made = artifacts(client, job)
    assert set(made) == {"sensitivity", "report", "page"}
    found = normsearch.Sensitivity.from_json(made["sensitivity"])
    expected = onnx_graph.sensitivity(graph, ["group", "instance"], [colour])
    assert [(one.site, one.method) for one in found.refusals] == [("bn4", "instance")]
    for site, row in expected.drift.items():
        for method, drift in row.items():
            assert found.drift[site][method] == (drift if drift is None else pytest.approx(drift, rel=1e-4))
    assert Document.from_json(made["report"]).section(HeatMap) is not None


@pytest.mark.parametrize(
    ("noun", "kind", "words"),
    [
        ("searches", "graph_model", "search on a checkpoint"),
        ("searches", "program_model", "search on a checkpoint"),
    ],
)
def test_what_a_kind_cannot_do_is_refused_with_a_way_out(
    client: TestClient, noun: str, kind: str, words: str, digits_data: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    refused = client.post(f"/v1/{noun}", json={"model": model["id"], "dataset": digits_data})
    assert refused.status_code == 422
    assert refused.json()["type"] == "/problems/refused"
    assert model["filename"] in refused.json()["detail"]
    assert words in refused.json()["detail"]


def test_other_keys_see_nothing(
    client: TestClient, graph_model: dict[str, Any], graph_job: dict[str, Any], twin_data: str
) -> None:
    other = bearer(client, "other")
    weights = graph_job["result"]["artifacts"][0]
    for path in (f"models/{graph_model['id']}", f"artifacts/{weights}", f"jobs/{graph_job['id']}"):
        assert client.get(f"/v1/{path}", headers=other).status_code == 404
    for noun, body in (
        ("plans", {"model": graph_model["id"], "to": "group"}),
        ("conversions", {"model": graph_model["id"], "to": "group"}),
        # Not even what it is that cannot be searched.
        ("searches", {"model": graph_model["id"], "dataset": twin_data}),
        ("calibrations", {"weights": weights, "dataset": twin_data, "parameters": "affine"}),
    ):
        assert client.post(f"/v1/{noun}", json=body, headers=other).status_code == 404, noun


def _sent(client: TestClient, name: str, content: bytes) -> Any:
    unique = f"{hashlib.sha256(content).hexdigest()[:8]}-{name}"
    made = client.put("/v1/uploads", params={"filename": unique}, content=content)
    return made if made.is_error else client.post("/v1/models", json={"upload": made.json()["id"]})


class _Hungry(torch.nn.Module):
    """Adds a terabyte of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(x) + torch.zeros(2**38).sum()
        return found


def _hungry_program() -> bytes:
    held = io.BytesIO()
    torch.export.save(torch.export.export(_Hungry().eval(), (torch.randn(2, 4, 3, 3),)), held)
    return held.getvalue()


def _hungry_graph() -> bytes:
    writer = onnx_networks.Writer("initializers")
    x = writer.batch_norm("x", "norm", torch.nn.BatchNorm2d(4))
    writer.initializers.append(onnx.numpy_helper.from_array(np.array([2**38]), "size"))
    zeros = writer.node("ConstantOfShape", ["size"], "zeros")
    total = writer.node("ReduceSum", [zeros], "total", keepdims=0)
    writer.node("Add", [x, total], "y")
    given, made = (onnx_networks.value(name, 2, 4, 3, 3) for name in ("x", "y"))
    return bytes(writer.model(17, [given], [made]).SerializeToString())


@pytest.mark.parametrize(("name", "make"), [("hungry.pt2", _hungry_program), ("hungry.onnx", _hungry_graph)])
def test_networks_that_take_more_memory_than_there_is(
    client: TestClient, name: str, make: Callable[[], bytes]
) -> None:
    model = _read_bytes(client, name, make())
    assert model["sites"] == 1
    body = {"model": model["id"], "to": "group", "input_shape": "4x3x3"}
    # Nothing is run without inputs.
    assert client.post("/v1/plans", json={**body, "input_shape": None}).status_code == 200
    refused = ended(client, posted(client, "/v1/conversions", body))["problem"]
    assert refused["status"] == 422
    assert refused["type"] in ("/problems/refused", "/problems/limits-exceeded"), refused


@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_attacks_are_refused_and_run_nothing(
    client: TestClient, folder: Path, tmp_path: Path, share: int
) -> None:
    """Hostile programs, and hostile ONNX files: every sixth, and in the longest tests all of them."""
    canary, secret = tmp_path / "canary", tmp_path / "secret"
    secret.write_bytes(b"secret" + bytes(10))
    valid = program_attacks.valid()
    programs = list(program_attacks.ATTACKS.items())[::share]
    chosen = [(name, "evil.pt2", attack.make(valid, canary), attack.harmless) for name, attack in programs]
    graphs = list(onnx_attacks.ATTACKS.items())[::share]
    chosen += [(name, "evil.onnx", make(str(secret)), False) for name, (make, _) in graphs]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda one: _sent(client, one[1], one[2]), chosen))
    for (name, _, _, harmless), answer in zip(chosen, answers, strict=True):
        if harmless:
            assert answer.status_code == 201, (name, answer.text)
            continue
        assert answer.status_code in (413, 422), (name, answer.text)
        document = answer.json()
        # The child refused it: it neither died nor was stopped.
        assert document["type"] in ("/problems/refused", "/problems/invalid-request"), (name, document)
        assert 20 < len(document["detail"]) < 1500, (name, document)
        assert str(folder) not in answer.text
        assert "secret" not in document["detail"].replace(str(secret), ""), name
    assert not canary.exists()
    assert list((folder / "data" / "work").iterdir()) == []


@pytest.mark.parametrize(("size", "told", "status"), [(-1, None, 200), (0, 0, 422)])
def test_batch_sizes_that_are_none(client: TestClient, size: int, told: int | None, status: int) -> None:
    """Some exporters write -1 for an open size, and onnxruntime takes it for one."""
    proto = onnx_networks.proto(onnx_networks.Twin().eval(), "initializers", 17)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    model = _read_bytes(client, f"odd{size}.onnx", proto.SerializeToString())
    assert model["inputs"][0]["shape"] == [told, 3, 8, 8]
    answer = client.post("/v1/plans", json={"model": model["id"], "input_shape": "3x8x8", "to": "group"})
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_that_are_none_are_refused(client: TestClient, value: str) -> None:
    proto = onnx_networks.proto(onnx_networks.Twin().eval(), "initializers", 17)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = float(value)
    answer = _sent(client, "numbers.onnx", proto.SerializeToString())
    assert answer.status_code == 422, answer.text
    assert answer.json()["type"] == "/problems/refused"
    assert value in answer.json()["detail"]
