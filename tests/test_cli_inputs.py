"""Commands that run networks on users' inputs: sensitivity, calibrate, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commanding import MODEL, NAME, RESNET, cli, interrupted, output
from PIL import Image
from safetensors.torch import load_file

import normsearch
from normsearch import Architecture, reporting
from normsearch.admission.images import Preparation, find_images, read_image

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def pictures(folder: Path) -> str:
    (folder / "pictures").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return "pictures"


def test_commands_take_a_folder_of_images(checkpoint: str, pictures: str) -> None:
    images = ["--inputs", pictures, "--image-size", "32"]
    result = cli("sites", checkpoint, *MODEL, *images, "--batch-size", "3", "--json")
    assert json.loads(result.stdout)[0]["input_shapes"][0][0] == 3
    assert "note: 8 of 8 images in pictures, 32 pixels square" in result.stderr
    made = output(
        "convert", checkpoint, *MODEL, *images, "--to", "group", "-o", "o.safetensors", "--report", "r.json"
    )
    report = output("compare", checkpoint, "o.safetensors", *MODEL, *images, "--batch-size", "4")
    assert report["drift"] == pytest.approx(made["report"]["drift"])
    x = torch.stack([read_image(path, Preparation(32)) for path in find_images(Path(pictures))])
    models = [normsearch.load("x.pth", RESNET).model, normsearch.load("o.safetensors").model]
    expected = normsearch.compare(*models, [x]).drift.relative_l2
    assert report["drift"]["relative_l2"] == pytest.approx(expected, rel=1e-4)


def test_arrays_of_another_type_are_cast_with_a_note(checkpoint: str, folder: Path) -> None:
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((2, 3, 32, 32)))
    result = cli("sites", checkpoint, *MODEL, "--inputs", "x.npz")
    assert "is float64 and was cast to the network's float32" in result.stderr
    np.savez(folder / "bytes.npz", np.zeros((2, 3, 32, 32), np.uint8))
    assert "scaled as in training" in cli("sites", checkpoint, *MODEL, "--inputs", "bytes.npz", code=1).stderr


def test_sensitivity(checkpoint: str, pictures: str, folder: Path) -> None:
    words = [
        "sensitivity",
        checkpoint,
        *MODEL,
        "--inputs",
        pictures,
        "--image-size",
        "32",
        "--batch-size",
        "4",
    ]
    few = [*words, "--to", "group,instance", "--to", "identity", "--site", "*bn1"]
    result = cli(*few, "-o", "s.json", "--threshold", "0.1")
    found = normsearch.Sensitivity.from_json((folder / "s.json").read_text())
    assert found.methods == ("group", "instance", "identity")
    assert all(site.endswith("bn1") for site in found.sites)
    model = normsearch.load("x.pth", RESNET).model
    x = [read_image(path, Preparation(32)) for path in find_images(Path(pictures))]
    batches = [torch.stack(x[:4]), torch.stack(x[4:])]
    expected = normsearch.sensitivity(model, ["group"], batches, sites=["bn1"])
    assert found.drift["bn1"]["group"] == pytest.approx(expected.drift["bn1"]["group"], rel=1e-3)
    vetoes = found.vetoes(0.1)
    assert (
        f"{sum(map(len, vetoes.values()))} vetoes at {len(vetoes)} of {len(found.sites)} sites"
        in result.stdout
    )
    assert json.loads(cli(*few, "--json").stdout)["methods"] == ["group", "instance", "identity"]
    noise = cli(
        "sensitivity", checkpoint, *MODEL, "--input-shape", "3x32x32", "--to", "frozen", "--batch-size", "2"
    )
    assert "note: inputs are random numbers" in noise.stderr
    assert "no veto" in noise.stdout


def test_report(checkpoint: str, pictures: str, folder: Path) -> None:
    images = ["--inputs", pictures, "--image-size", "32", "--batch-size", "4"]
    cli("convert", checkpoint, *MODEL, "--to", "switchable", "-o", "o.safetensors")
    cli("sensitivity", checkpoint, *MODEL, *images, "--to", "switchable", "-o", "s.json", "--site", "bn1")
    common = ["report", checkpoint, "o.safetensors", *MODEL, *images]
    result = cli(*common, "--sensitivity", "s.json", "--logits", "-o", "r.html", "--title", "<mine>")
    assert result.stdout == "wrote r.html, r.json\n"
    made = reporting.Document.from_json((folder / "r.json").read_text())
    assert made.title == "<mine>"
    kinds = [section.kind for section in made.sections]
    assert kinds == ["summary", "layers", "sensitivity", "gates", "cost", "dependence", "notes"]
    x = torch.stack([read_image(path, Preparation(32)) for path in find_images(Path(pictures))])
    models = [normsearch.load("x.pth", RESNET).model, normsearch.load("o.safetensors").model]
    expected = normsearch.compare(*models, [x], logits=True).drift
    summary = made.section(reporting.Summary)
    assert summary is not None
    assert summary.converted is not None
    assert summary.converted.relative_l2 == pytest.approx(expected.relative_l2, rel=1e-4)
    # Nothing is replaced; the JSON gives the same page again.
    assert "r.html exists" in cli(*common, "-o", "r.json", code=1).stderr
    before = (folder / "r.html").read_text()
    cli("report", "r.json", "-o", "again.html")
    assert (folder / "again.html").read_text() == before
    assert json.loads(cli("report", "r.json", "--json").stdout) == json.loads((folder / "r.json").read_text())
    (folder / "bad.json").write_text("{}")
    assert "not a report" in cli("report", "bad.json", "-o", "b.html", code=1).stderr
    # Without inputs: what needs no forward pass.
    short = json.loads(cli("report", checkpoint, "o.safetensors", *MODEL, "--json").stdout)
    assert [section["kind"] for section in short["sections"]] == ["summary", "layers", "gates"]


def test_report_refuses_checkpoints_that_do_not_belong_together(checkpoint: str) -> None:
    cli("convert", checkpoint, *MODEL, "--to", "group", "-o", "o.safetensors", "--no-script")
    cli("convert", checkpoint, *MODEL, "--to", "rms", "-o", "p.safetensors", "--no-script")
    for words, message in (
        (["o.safetensors", checkpoint], "give the original first"),
        ([checkpoint, "o.safetensors", "--calibrated", "p.safetensors"], "has another plan"),
    ):
        assert message in cli("report", *words, *MODEL, "-o", "r.html", code=1).stderr
    other = ["-a", NAME, "--arguments", "num_classes=4"]
    torch.save(normsearch.build(Architecture(NAME, {"num_classes": 4})).state_dict(), "y.pth")
    assert "does not fit" in cli("report", "y.pth", "o.safetensors", *other, "-o", "r.html", code=1).stderr


def test_calibrate(checkpoint: str, pictures: str, folder: Path) -> None:
    images = ["--inputs", pictures, "--image-size", "32", "--batch-size", "2"]
    cli("convert", checkpoint, *MODEL, "--to", "group", "-o", "o.safetensors")
    common = ["calibrate", checkpoint, "o.safetensors", *MODEL, *images, "--budget", "6"]
    result = cli(*common, "-o", "c.safetensors", "--report", "c.html")
    assert "held-out error" in result.stdout
    assert result.stdout.endswith("wrote c.safetensors, c_model.py, c.html, c.json\n")
    again = output(*common, "-o", "d.safetensors", "--no-script")
    assert again["written"] == ["d.safetensors"]
    one, two = load_file("c.safetensors"), load_file("d.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    original, converted = normsearch.load("x.pth", RESNET).model, normsearch.load("o.safetensors").model
    calibrated = normsearch.load("c.safetensors")
    assert calibrated.plan == normsearch.load("o.safetensors").plan
    x = torch.stack([read_image(path, Preparation(32)) for path in find_images(Path(pictures))])
    drifts = [normsearch.compare(original, m, [x]).drift.relative_l2 for m in (converted, calibrated.model)]
    assert drifts[1] < drifts[0]
    made = reporting.Document.from_json((folder / "c.json").read_text())
    done, summary = made.section(reporting.CalibrationPart), made.section(reporting.Summary)
    assert done is not None
    assert summary is not None
    assert summary.converted is not None
    assert summary.calibrated is not None
    found = [summary.converted.relative_l2, summary.calibrated.relative_l2]
    assert found == pytest.approx(drifts, rel=1e-4)
    assert done.after == pytest.approx(again["calibration"]["error"]["after"])
    torch.save(x, "x.pt")
    code = (
        "import sys; sys.modules['normsearch'] = None\n"
        "import torch; from c_model import load; torch.save(load()(torch.load('x.pt')), 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load("y.pt"), calibrated.model(x))
    assert "exists" in cli(*common, "-o", "c.safetensors", code=1).stderr


SLOW = """
import time
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 16, 3)
        self.norm = nn.BatchNorm1d(16)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 3 and Path("go").exists():
            Path("started").touch()
            time.sleep(60)
        return self.norm(self.conv(x))
"""


def test_interrupted_calibration_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "slow_net.py").write_text(SLOW)
    sys.modules.pop("slow_net", None)
    monkeypatch.syspath_prepend(folder)
    model = ["-a", "slow_net:Net"]
    network = normsearch.build(Architecture("slow_net:Net"), allow_factories=True)
    torch.save(network.state_dict(), "x.pth")
    np.savez(folder / "x.npz", np.random.default_rng(0).standard_normal((8, 2, 9)).astype(np.float32))
    cli("convert", "x.pth", *model, "--to", "group", "-o", "o.safetensors", "--no-script")
    (folder / "go").touch()
    before = set(os.listdir(folder))
    words = ["calibrate", "x.pth", "o.safetensors", *model, "--inputs", "x.npz", "--batch-size", "2", "-o"]
    returncode, stderr = interrupted([*words, "c.safetensors", "--report", "c.html"], folder / "started")
    assert returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted; nothing half-written is left"
    assert set(os.listdir(folder)) - {"__pycache__"} == (before | {"started"}) - {"__pycache__"}
