"""Parameters of an ONNX model are those that torch counts, as nearly as the graph tells."""

from __future__ import annotations

import pytest
import torch

import normsearch

pytest.importorskip("onnx", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
ir = pytest.importorskip("onnx_ir", reason="needs the extra onnx: pip install 'normsearch[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'normsearch[onnx]'")

from onnx_networks import FORMS, Twin, Writer, model, value  # noqa: E402

from normsearch import onnx_graph  # noqa: E402
from normsearch.onnx_graph.measuring import parameters  # noqa: E402


def counted(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_running_statistics_are_none(form: str) -> None:
    twin = Twin(shared=form == "shared").eval()
    # The shared form writes two layers' numbers once.
    shared = counted(twin.bn3) if form == "shared" else 0
    assert parameters(model(twin, form)) == counted(twin) - shared


@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize(
    "method", ["group", "layer", "rms", "instance", "filter_response", "evonorm_s0", "identity"]
)
def test_converted_models_have_what_the_converted_network_has(method: str, opset: int) -> None:
    twin, to = Twin().eval(), {"bn4": [method, "group"], "*": [method, "group"]}
    inputs = torch.randn(3, 3, 8, 8)
    network = normsearch.convert(twin, to, inputs=inputs)
    converted = onnx_graph.convert(model(twin, opset=opset), to, inputs=inputs)
    assert parameters(converted) == counted(network)


def test_numbers_of_arithmetic_and_sizes_are_none() -> None:
    w = Writer("initializers")
    x = w.node("Add", ["x", w.constant("eps", torch.tensor(1e-5))], "a")
    x = w.node(
        "Clip", [x, w.constant("low", torch.tensor(0.0)), w.constant("high", torch.tensor([6.0]))], "b"
    )
    x = w.node("Mul", [x, w.constant("scale", torch.rand(1, 3, 1, 1))], "c")
    x = w.node("Resize", [x, "", w.constant("sizes", torch.tensor([1.0, 1, 2, 2]))], "d")
    # One output channel: a weight and a bias of one number each, that count.
    weight, bias = w.constant("weight", torch.rand(1, 3, 1, 1)), w.constant("bias", torch.rand(1))
    w.node("Conv", [x, weight, bias], "y")
    made = w.model(17, [value("x", 1, 3, 4, 4)], [value("y", 1, 1, 8, 8)])
    assert parameters(ir.from_proto(made)) == 3 + 3 + 1
