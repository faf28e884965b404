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
    # A plan of another conversion, and one of another network.
    assert "has 4; give the plan" in run("report", model, model, "--plan", plan, "--json", fails=1).stderr
    other = json.loads(plan.read_text())
    other["rows"][0]["site"]["path"] = "elsewhere"
    plan.write_text(json.dumps(other))
    assert "'elsewhere'" in run("report", model, out, "--plan", plan, "--json", fails=1).stderr


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
            "no such option",
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
