"""The command line on ONNX files: looked at, planned, converted, compared, calibrated, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from normsearch.cli import app

onnx = pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

from onnx_networks import Twin, proto  # noqa: E402

import normsearch  # noqa: E402
from normsearch import onnx_graph  # noqa: E402
from normsearch.reporting import CalibrationPart, Document, HeatMap, Summary  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and inputs for it."""
    place = tmp_path_factory.mktemp("onnx")
    (place / "model.onnx").write_bytes(proto(Twin().eval(), "initializers", 17).SerializeToString())
    generator = torch.Generator().manual_seed(0)
    np.savez(place / "inputs.npz", torch.randn(48, 3, 8, 8, generator=generator).numpy())
    return place


def run(*args: Any, fails: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == fails, result.output
    return result


def test_sites_and_plan(folder: Path, tmp_path: Path) -> None:
    found = json.loads(run("sites", folder / "model.onnx", "--json").stdout)
    assert [site["path"] for site in found] == ["bn1", "bn2", "bn3", "bn4"]
    assert found[0]["layer"] == "onnx.BatchNormalization"
    assert "conv1" in run("sites", folder / "model.onnx", "--input-shape", "3x8x8").stdout
    plan = tmp_path / "plan.json"
    run("plan", folder / "model.onnx", "--to", "bn4=frozen", "--to", "group", "-o", plan)
    assert str(normsearch.Plan.from_json(plan.read_bytes())["bn1"]) == "group(groups=2)"
    result = run("plan", folder / "model.onnx", "--to", "instance", fails=1)
    assert "bn4: instance refused" in result.stderr


def test_convert_compare_and_calibrate(folder: Path, tmp_path: Path) -> None:
    model, inputs = folder / "model.onnx", folder / "inputs.npz"
    out, report, calibrated = (tmp_path / name for name in ("out.onnx", "report.json", "calibrated.onnx"))
    written = json.loads(
        run(
            "convert", model, "--to", "group", "-o", out, "--inputs", inputs, "--report", report, "--json"
        ).stdout
    )
    assert written["written"] == [str(out), str(report)]
    assert not onnx_graph.find_sites(out)
    drift = json.loads(report.read_text())["drift"]["relative_l2"]
    done = run("calibrate", model, out, "--inputs", inputs, "--batch-size", 8, "-o", calibrated, "--json")
    record = json.loads(done.stdout)["calibration"]
    assert record["error"]["after"] < record["error"]["before"]
    after = json.loads(run("compare", model, calibrated, "--inputs", inputs, "--json").stdout)
    assert after["drift"]["relative_l2"] < drift
    assert after["batch_norms"] == {"before": 4, "after": 0}
    assert "whitening" in run("calibrate", model, out, "--inputs", inputs, "-o", calibrated, "--force").stdout
    plan = tmp_path / "plan.json"
    run("plan", model, "--to", "group", "-o", plan)
    again = tmp_path / "again.onnx"
    assert "wrote" in run("convert", model, "--plan", plan, "-o", again).stdout
    assert again.read_bytes() == out.read_bytes()
    run("convert", model, "--to", "group", "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.onnx",
        "calibrated.onnx",
        "out.onnx",
        "plan.json",
        "report.json",
    ]


def test_sensitivity_and_report(folder: Path, tmp_path: Path) -> None:
    model, inputs = folder / "model.onnx", folder / "inputs.npz"
    out, plan, calibrated, drifts, page = (
        tmp_path / name for name in ("out.onnx", "plan.json", "calibrated.onnx", "drifts.json", "page.html")
    )
    printed = run("sensitivity", model, "-t", "group,instance", "--inputs", inputs, "-o", drifts).stdout
    assert "vetoes at" in printed
    assert "bn4: instance refused: an input (N, C) has no space to normalize over" in printed
    found = normsearch.Sensitivity.from_json(drifts.read_bytes())
    assert found.drift["bn4"]["instance"] is None
    run("plan", model, "--to", "group", "-o", plan)
    run("convert", model, "--plan", plan, "-o", out)
    run("calibrate", model, out, "--inputs", inputs, "--batch-size", 8, "-o", calibrated)
    given = ("--plan", plan, "--inputs", inputs, "--calibrated", calibrated, "--sensitivity", drifts)
    run("report", model, out, *given, "-o", page)
    made = Document.from_json(page.with_suffix(".json").read_bytes())
    assert made.title == "model.onnx"
    assert made.section(CalibrationPart) is None  # the file does not say what calibration did
    summary, drift = made.section(Summary), made.section(HeatMap)
    assert drift is not None
    assert [row.site for row in drift.rows] == ["bn1", "bn2", "bn3", "bn4"]
    assert summary is not None
    assert summary.converted is not None
    assert summary.calibrated is not None
    assert (summary.calibrated.relative_l2 or 1) < (summary.converted.relative_l2 or 0)
    assert "bn3" in page.read_text()
    # A plan of another network, and what another conversion made, with as many layers left.
    for changed, which in (
        ((model, "converted"), (model,)),
        ((out, "calibrated"), (out, "--calibrated", model)),
    ):
        said = run("report", model, *which, "--plan", plan, "--json", fails=1).stderr
        assert f"the {changed[1]} model is not what the plan makes" in said
    identity = tmp_path / "identity.onnx"
    run("convert", model, "--to", "identity", "-o", identity)
    run("report", model, identity, "--plan", plan, "--json", fails=1)
    text = plan.read_text()
    plan.write_text(text.replace("groups=2", "groups=4"))
    run("report", model, out, "--plan", plan, "--json", fails=1)
    plan.write_text(text.replace('"path": "bn2"', '"path": "elsewhere"'))
    assert "'elsewhere'" in run("report", model, out, "--plan", plan, "--json", fails=1).stderr
    # A sensitivity of another network.
    plan.write_text(text)
    drifts.write_text(drifts.read_text().replace("bn2", "bn9"))
    said = run("report", model, out, "--plan", plan, "--sensitivity", drifts, "--json", fails=1).stderr
    assert "the site 'bn9'" in said


def test_a_fixed_batch_size_is_kept_to(tmp_path: Path) -> None:
    from onnx import parser

    fixed = tmp_path / "fixed.onnx"
    text = '<ir_version: 8, opset_import: ["": 21]> g (float[4,2,4,4] x) => (float[4,2,4,4] y)'
    text += "<float[2] s = {1, 1}, float[2] b = {0, 0}> {y = BatchNormalization(x, s, b, b, s)}"
    onnx.save(parser.parse_model(text), fixed)
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, np.random.default_rng(0).normal(size=(10, 2, 4, 4)).astype(np.float32))
    result = run("sensitivity", fixed, "--to", "instance", "--inputs", inputs, "--json")
    assert "batches of 4 samples alone" in result.stderr
    samples = torch.from_numpy(np.load(inputs)["arr_0"])
    used = samples[torch.linspace(0, 9, 8).round().long()].split(4)
    wanted = onnx_graph.sensitivity(fixed, "instance", used)
    assert json.loads(result.stdout)["drift"]["y"]["instance"] == pytest.approx(
        wanted.drift["y"]["instance"], rel=0.2
    )
    np.savez(inputs, np.zeros((3, 2, 4, 4), np.float32))
    said = run("sensitivity", fixed, "--to", "instance", "--inputs", inputs, fails=1).stderr
    assert "takes batches of 4 samples, and 3 are given" in said


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("convert", "model.onnx", "--to", "group", "-o", "out.pth"), 1, "written as .onnx"),
        (
            ("convert", "model.onnx", "--to", "group", "-o", "model.onnx", "--force"),
            1,
            "is read by this command",
        ),
        (("convert", "model.onnx", "--to", "nothing", "-o", "out.onnx"), 1, "unknown method 'nothing'"),
        (
            ("convert", "model.onnx", "--to", "group", "-o", "o.onnx", "-a", "timm/resnet18"),
            2,
            "no such option",
        ),
        (("convert", "none.onnx", "--to", "group", "-o", "out.onnx"), 1, "cannot read"),
        (("convert", "broken.onnx", "--to", "group", "-o", "out.onnx"), 1, "broken.onnx"),
        (("compare", "model.onnx", "inputs.npz", "--input-shape", "3x8x8"), 1, "give ONNX files only"),
        (("compare", "model.onnx", "model.onnx", "--input-shape", "4x8x8"), 1, "failed on the given inputs"),
        (("report", "r.json", "--plan", "plan.json", "-o", "r.html"), 2, "a report's JSON stands alone"),
        (("sensitivity", "model.onnx", "--input-shape", "3x8x8", "--threshold", "0"), 1, "a drift above 0"),
        (("sensitivity", "model.onnx", "--input-shape", "4x8x8"), 1, "it takes x float (batch, 3, 8, 8)"),
        (
            ("report", "model.onnx", "model.onnx", "--plan", "plan.json", "-o", "r.pdf"),
            1,
            "written as .html and .json",
        ),
        (("report", "model.onnx", "model.onnx", "-o", "r.html"), 2, "does not say how it was converted"),
        (("report", "a.pth", "b.pth", "--plan", "plan.json", "-o", "r.html"), 2, "ONNX files alone"),
        (("sensitivity", "model.onnx", "--input-shape", "3x8x8", "-a", "timm/resnet18"), 2, "no such option"),
        (("profile", "model.onnx", "--input-shape", "3x8x8", "-a", "timm/resnet18"), 1, "is an ONNX model"),
        (
            (
                "calibrate",
                "model.onnx",
                "model.onnx",
                "--inputs",
                "inputs.npz",
                "-o",
                "o.onnx",
                "--report",
                "r.html",
            ),
            2,
            "no such option; normsearch report --calibrated writes it",
        ),
    ],
)
def test_errors_are_one_message(
    args: tuple[str, ...], code: int, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("broken.onnx").write_bytes(b"\x08\x07broken")
    before = sorted(folder.iterdir())
    result = run(*args, fails=code)
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert sorted(folder.iterdir()) == before
