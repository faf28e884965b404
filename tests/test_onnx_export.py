"""export to ONNX: the normalizations are operators of their own, and the file is what the network is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normsearch

pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

from onnx_networks import Twin

from normsearch import onnx_graph
from normsearch.exporting import _compare
from normsearch.onnx_graph.running import Runtime


def test_normalizations_are_operators_of_their_own(tmp_path: Path) -> None:
    model = Twin().train()
    to = {"bn1": "group", "bn2": "instance", "bn3": "layer(axes=channel)", "bn4": "frozen"}
    converted = normsearch.convert(model, to)
    path = tmp_path / "model.onnx"
    normsearch.export(converted, path, torch.randn(2, 3, 8, 8))
    assert converted.training
    file = onnx_graph.load(path)
    kinds = [node.op_type for node in file.graph]
    for kind in ("GroupNormalization", "InstanceNormalization", "LayerNormalization"):
        assert kinds.count(kind) == 1
    x = torch.randn(5, 3, 8, 8)
    (found,) = Runtime(file)(x).values()
    with torch.no_grad():
        torch.testing.assert_close(found, converted.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(normsearch.CheckpointError, match="exists"):
        normsearch.export(converted, path, x)


def in_type(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    return nn.Sequential(*layers).eval().to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)


def test_rounding_of_half_precision_is_no_difference(tmp_path: Path) -> None:
    model, x = in_type(torch.float16)
    for name, network in {"batch": model, "group": normsearch.convert(model, "group")}.items():
        path = tmp_path / f"{name}.onnx"
        normsearch.export(network, path, x)
        (found,) = Runtime(onnx_graph.load(path))(x).values()
        with torch.no_grad():
            distance = (found - network(x)).abs().max() / network(x).abs().max()
        assert found.dtype == torch.float16
        assert distance <= 8 * torch.finfo(torch.float16).eps


def test_more_than_rounding_is_refused_in_half_precision_too(tmp_path: Path) -> None:
    model, x = in_type(torch.float16)
    written = nn.Sequential(model, nn.Hardtanh(-0.5, 0.5))
    with pytest.raises(normsearch.ModelError, match="not written"):
        _compare(model, written, x, "half.onnx")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_that_onnxruntime_cannot_run_say_the_way_out(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = in_type(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(normsearch.ModelError, match=rf"in {name}, .*export model\.float\(\)"):
        normsearch.export(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    """Python code that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(normsearch.ModelError, match="cannot export Branches"):
        normsearch.export(Branches(), tmp_path / "model.onnx", torch.ones(2))
    with pytest.raises(normsearch.CheckpointError, match=r"\.onnx"):
        normsearch.export(Branches(), tmp_path / "model.pb", torch.ones(2))
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "import torch, normsearch\n"
        "from normsearch.commands.onnx_files import library\n"
        "layer = torch.nn.Linear(1, 1)\n"
        "for act in (library, lambda: normsearch.export(layer, 'm.onnx', torch.ones(2, 1))):\n"
        "    try: act()\n"
        "    except normsearch.NormsearchError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.count("pip install 'normsearch[onnx]'") == 2
