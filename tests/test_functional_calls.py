"""Batch normalization without a layer, traced graphs, and code that reads a layer from outside."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import close, images, net, trained
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from normsearch import (
    RefusedError,
    convert,
    find_sites,
)

torch.set_num_threads(1)

METHODS = ["frozen", "group", "layer", "layer(axes=channel)", "rms", "batch_renorm", "batch_instance"]
METHODS += ["instance", "switchable"]


# --- functional calls -----------------------------------------------------------------------------


class Functional(nn.Module):
    """Normalizes without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.norm(x), self.mean, self.var, training=self.training, eps=1e-3)
        return F.relu(x)


class ThroughTorch(Functional):
    """The same by another name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(self.norm(x), self.mean, self.var)


class Hidden(Functional):
    """The same in a method, which only a forward pass shows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.norm(x), self.mean, self.var, None, None, False, 0.1, 1e-3)


class Named(nn.Module):
    """A layer that is called batch_norm."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x)


class StandardizedConv(nn.Conv2d):
    """Weight standardization as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("owner", [Functional, ThroughTorch])
def test_a_functional_batch_norm_is_converted_through_the_models_graph(owner: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), owner()).eval()
    assert [(site.path, site.kind) for site in find_sites(model)] == [
        ("1.norm", "batch"),
        ("1.norm_1", "functional"),
    ]
    converted = convert(model, "frozen")
    assert isinstance(converted, torch.fx.GraphModule)
    assert find_sites(converted) == ()
    close(converted(images()), model(images()))


def test_a_functional_batch_norm_that_cannot_be_traced_is_refused_and_can_be_left_out() -> None:
    class Untraceable(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else x

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Untraceable())
    assert [(site.path, site.kind) for site in find_sites(model)] == [
        ("1.norm", "batch"),
        ("1:batch_norm", "functional"),
    ]
    with pytest.raises(
        RefusedError, match=r"1:batch_norm: .*Untraceable calls F\.batch_norm itself: torch\.fx"
    ):
        convert(model, "group")
    converted = convert(model, "group", where=lambda site: site.kind != "functional")
    assert type(converted[1].norm) is nn.GroupNorm


def test_a_functional_batch_norm_hidden_in_a_method_is_found_with_inputs() -> None:
    model = nn.Sequential(Hidden())
    sites = find_sites(model, images())
    found = [(site.path, site.calls, site.eps, site.channels) for site in sites if site.kind == "functional"]
    assert found == [("0.norm_1", 1, 1e-3, 3)]
    converted = convert(model.eval(), "frozen", inputs=images())
    assert find_sites(converted, images()) == ()
    close(converted(images()), model(images()))


@pytest.mark.parametrize("inputs", [None, images()], ids=["code", "forward pass"])
def test_an_attribute_called_batch_norm_is_not_a_functional_call(inputs: Tensor | None) -> None:
    model = trained(Named()).eval()
    assert [(site.path, site.kind) for site in find_sites(model, inputs)] == [("batch_norm", "batch")]
    close(convert(model, "frozen", inputs=inputs)(images()), model(images()))


@pytest.mark.parametrize("inputs", [None, images()], ids=["code", "forward pass"])
def test_weight_standardization_is_not_a_site(inputs: Tensor | None) -> None:
    model = nn.Sequential(StandardizedConv(3, 8, 3), trained(nn.BatchNorm2d(8))).eval()
    assert [site.path for site in find_sites(model, inputs)] == ["1"]
    converted = convert(model, "frozen", inputs=inputs)
    assert type(converted[0]) is StandardizedConv
    close(converted(images()), model(images()))


def test_a_fused_layers_own_call_is_not_reported_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))
    assert [(site.path, site.activation) for site in find_sites(model, images())] == [("1", "ReLU")]


# --- torch.fx -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_traced_graph_module_converts_like_its_model(method: str, in_place: bool) -> None:
    model = net().eval()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    converted = convert(traced, method, in_place=in_place)
    assert isinstance(converted, torch.fx.GraphModule)
    close(converted(images()), convert(model, method)(images()))
    assert find_sites(converted) == ()


def test_a_traced_functional_call_is_converted() -> None:
    traced = torch.fx.symbolic_trace(Functional().eval())
    assert [site.kind for site in find_sites(traced)] == ["batch", "functional"]
    converted = convert(traced, "frozen")
    assert find_sites(converted) == ()
    close(converted(images()), traced(images()))
