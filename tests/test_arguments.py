"""Forward passes with positional and named arguments at once: in Python, in files, in exported models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import normsearch
from normsearch import Arguments
from normsearch.admission.arrays import read_inputs
from normsearch.cli import app

CODE = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    def forward(self, x, scale):
        return self.bn(self.conv(x)) * scale[:, None, None, None]
"""


class Net(nn.Module):
    """As in ``CODE``, its second argument by keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """Normalize and scale."""
        result: Tensor = self.bn(self.conv(x)) * scale[:, None, None, None]
        return result


def inputs(count: int = 8) -> Arguments:
    return Arguments((torch.randn(count, 3, 8, 8),), {"scale": torch.rand(count)})


def test_every_measurement_passes_both_on() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    batches = [inputs(), inputs()]
    converted = normsearch.convert(model, "group", inputs=batches[0])
    found = normsearch.compare(model, converted, batches)
    with torch.no_grad():
        before, after = (
            torch.cat([net(*batch.args, **batch.kwargs) for batch in batches]) for net in (model, converted)
        )
    assert found.drift.relative_l2 == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    # A sample is taken with its own scale: its output alone is the same.
    assert found.batch_dependence.after.eval_alone == pytest.approx(0, abs=1e-6)
    effects = normsearch.sensitivity(model, ["group"], batches)
    assert effects.drift["bn"]["group"] == pytest.approx(found.drift.relative_l2, rel=1e-5)
    calibrated = normsearch.calibrate(converted, model, batches, budget=2)
    assert normsearch.compare(model, calibrated, batches).drift.relative_l2 < found.drift.relative_l2


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_models_with_both_are_exported_with_an_open_batch(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = Net().eval()
    path = tmp_path / f"net{suffix}"
    normsearch.export(model, path, inputs())
    other = inputs(3)
    expected = model(*other.args, **other.kwargs).detach()
    if suffix == ".pt2":
        found = torch.export.load(path).module()(*other.args, **other.kwargs)
    else:
        from normsearch import onnx_graph
        from normsearch.onnx_graph.running import Runtime

        (found,) = Runtime(onnx_graph.load(path))(*other.args, **other.kwargs).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_arrays_in_a_file_may_be_positional_and_named(tmp_path: Path) -> None:
    x, y, scale = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), np.arange(2)
    np.savez(tmp_path / "mixed.npz", x, y, scale=scale)
    found = read_inputs(tmp_path / "mixed.npz")
    assert isinstance(found, Arguments)
    assert [float(array.sum()) for array in found.args] == [6, 0]
    assert found.kwargs["scale"].tolist() == [0, 1]


@pytest.mark.parametrize("names", ["mixed", "named"])
def test_command_line_takes_both(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{names}_net.py").write_text(CODE)
    model = normsearch.build(f"{names}_net:Net", allow_factories=True).eval()
    torch.save(model.state_dict(), "net.pth")
    given = inputs()
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, given.args, given.kwargs, dynamic_shapes={"x": batch, "scale": batch}
    )
    torch.export.save(program, "net.pt2")
    x, scale = given.args[0].numpy(), given.kwargs["scale"].numpy()
    if names == "mixed":
        np.savez("x.npz", x, scale=scale)
    else:
        np.savez("x.npz", x=x, scale=scale)
    drifts = []
    for words in (["net.pth", "-a", f"{names}_net:Net", "-o", "out.safetensors"], ["net.pt2", "-o", "o.pt2"]):
        options = ["--to", "group", "--inputs", "x.npz", "--report", f"{len(drifts)}.json"]
        result = CliRunner().invoke(app, ["convert", *words, *options])
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / f"{len(drifts)}.json").read_text())
        drifts.append(report["drift"]["relative_l2"])
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-5)
    assert drifts[0] > 0
