"""ONNX models written by hand, in every form that BatchNormalization comes in, and their twins in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

#: Where BatchNormalization's parameters are.
FORMS = ("initializers", "constants", "identities", "inputs", "shared")
CHANNELS = 32


class Twin(nn.Module):
    """A convolution, a depthwise one in a residual, a transposed one, a linear layer, each with BatchNorm."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(CHANNELS, eps=1e-3)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.conv3 = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2, groups=2)
        self.bn3 = nn.BatchNorm2d(CHANNELS)
        self.act3 = nn.ReLU()
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.bn4 = nn.BatchNorm1d(CHANNELS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.2, generator=generator)
            for bn in (self.bn1, self.bn2, self.bn3, self.bn4):
                bn.weight.normal_(generator=generator)
                bn.weight[0] = 0
                bn.running_mean.normal_(0, 0.3, generator=generator)
                bn.running_var.uniform_(0.5, 2, generator=generator)
                bn.num_batches_tracked.fill_(3)
            if shared:
                self.bn3.load_state_dict(self.bn2.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = x + self.bn2(self.conv2(x))
        x = self.act3(self.bn3(self.conv3(x)))
        return self.bn4(self.linear(x.mean((2, 3))))


class Writer:
    """Writes nodes and constants of a graph in one form."""

    def __init__(self, form: str, dtype: type = np.float32) -> None:
        self.form, self.dtype = form, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Tensor) -> str:
        tensor = onnx.numpy_helper.from_array(values.detach().numpy().astype(self.dtype), name)
        if any(one.name == name for one in self.initializers):
            return name
        if self.form == "constants":
            self.node("Constant", [], name, value=tensor)
            return name
        self.initializers.append(tensor)
        if self.form == "identities":
            self.node("Identity", [name], f"{name}.same")
            return f"{name}.same"
        return name

    def node(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> str:
        made = helper.make_node(kind, inputs, [output], name=name, **attributes)
        self.nodes.append(made)
        return output

    def batch_norm(self, x: str, path: str, layer: nn.Module, parameters: str | None = None) -> str:
        at = parameters or path
        names = [
            self.constant(f"{at}.{key}", getattr(layer, key))
            for key in ("weight", "bias", "running_mean", "running_var")
        ]
        return self.node("BatchNormalization", [x, *names], f"{path}.y", path, epsilon=float(layer.eps))  # type: ignore[arg-type]

    def model(
        self, opset: int, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        ir_version = 3 if self.form == "inputs" else 8 if opset < 19 else 10
        if self.form == "inputs":
            inputs = inputs + [
                helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initializers
            ]
        graph = helper.make_graph(self.nodes, "network", inputs, outputs, self.initializers)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def value(name: str, *sizes: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, sizes)


def proto(twin: Twin, form: str, opset: int, *, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Write the twin as ONNX, its batch size dynamic; nodes are called as torch calls the modules."""
    w = Writer(form, helper.tensor_dtype_to_np_dtype(dtype))
    x = w.node(
        "Conv",
        ["x", w.constant("conv1.weight", twin.conv1.weight), w.constant("conv1.bias", twin.conv1.bias)],
        "conv1.y",
        "conv1",
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
    )
    x = w.node("Relu", [w.batch_norm(x, "bn1", twin.bn1)], "act1.y", "act1")
    y = w.node(
        "Conv",
        [x, w.constant("conv2.weight", twin.conv2.weight)],
        "conv2.y",
        "conv2",
        pads=[1, 1, 1, 1],
        group=CHANNELS,
    )
    x = w.node("Add", [x, w.batch_norm(y, "bn2", twin.bn2)], "sum", "sum")
    x = w.node(
        "ConvTranspose",
        [x, w.constant("conv3.weight", twin.conv3.weight), w.constant("conv3.bias", twin.conv3.bias)],
        "conv3.y",
        "conv3",
        strides=[2, 2],
        group=2,
    )
    bn3 = w.batch_norm(x, "bn3", twin.bn3, "bn2" if form == "shared" else None)
    x = w.node("Relu", [bn3], "act3.y", "act3")
    x = w.node("Flatten", [w.node("GlobalAveragePool", [x], "pooled", "pool")], "flat", "flatten")
    x = w.node(
        "Gemm",
        [x, w.constant("linear.weight", twin.linear.weight), w.constant("linear.bias", twin.linear.bias)],
        "linear.y",
        "linear",
        transB=1,
    )
    w.batch_norm(x, "bn4", twin.bn4)
    return w.model(
        opset, [value("x", "batch", 3, 8, 8, dtype=dtype)], [value("bn4.y", "batch", CHANNELS, dtype=dtype)]
    )


def model(twin: Twin, form: str = "initializers", opset: int = 17, **options: Any) -> ir.Model:
    """Return the twin as a model of onnx-ir."""
    return ir.from_proto(proto(twin, form, opset, **options))
