"""Operator norms against each layer's dense matrix, and the bounds that spectral normalization promises."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normsearch import ModelError, convert, operator_norms


def dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of the layer's linear part, written out column by column."""
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        offset = layer(torch.zeros(1, *shape, dtype=torch.float64))
        columns = (layer(basis) - offset).flatten(1)
    return float(torch.linalg.matrix_norm(columns, 2))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 6, 6)),
    "strided": (lambda: nn.Conv2d(2, 4, 4, stride=2, padding=1), (2, 8, 8)),
    "dilated": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2), (2, 7, 7)),
    "grouped": (lambda: nn.Conv1d(4, 6, 5, groups=2), (4, 12)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "volume": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, groups=1), (3, 4, 4)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 6)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_operator_norm_is_that_of_the_dense_matrix(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    (norms,) = operator_norms(
        nn.Sequential(layer), torch.randn(2, *shape, dtype=torch.float64), iterations=2000
    ).layers
    assert norms.operator == pytest.approx(dense_norm(layer, shape), rel=1e-4)
    if kind == "reflect":
        assert norms.bound is None
    else:
        assert norms.bound is not None
        assert norms.operator is not None
        assert norms.operator <= norms.bound * (1 + 1e-12)


@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), dilation=st.integers(1, 3), padding=st.integers(0, 2)
)
@settings(max_examples=40, deadline=None)
def test_bound_holds_for_any_kernel_stride_and_dilation(
    kernel: int, stride: int, dilation: int, padding: int
) -> None:
    torch.manual_seed(kernel)
    layer = nn.Conv1d(1, 1, kernel, stride, padding, dilation).double()
    # Equal entries stretch the most: the bound is reached away from the border.
    nn.init.ones_(layer.weight)
    (norms,) = operator_norms(layer, torch.randn(1, 1, 24, dtype=torch.float64), iterations=500).layers
    assert norms.bound is not None
    assert norms.operator == pytest.approx(dense_norm(layer, (1, 24)), rel=1e-3)
    assert dense_norm(layer, (1, 24)) <= norms.bound * (1 + 1e-9)


def test_fixed_gain_keeps_its_promise_after_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1)
    )
    bounded = convert(model, "spectral(gain=fixed)", weights=True)
    x = torch.randn(8, 1, 6, 6)
    optimizer = torch.optim.Adam(bounded.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-bounded(x).mean()).backward()
        optimizer.step()
    for layer in operator_norms(bounded, x).layers:
        assert layer.matrix <= 1.01
        assert layer.operator is not None
        assert layer.operator <= (3.03 if layer.layer.endswith("Conv2d") else 1.01)


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_a_forward_pass_misses_keep_their_matrix_norm() -> None:
    model = Partial().train()
    norms = operator_norms(model, torch.randn(2, 3))
    used, idle = norms.layers
    assert idle.operator is None
    assert idle.matrix > 0
    assert norms.product == used.operator
    assert model.training
    assert json.loads(norms.to_json())["layers"][1]["path"] == "idle"


def test_zero_weights_have_norm_zero() -> None:
    layer = nn.Conv2d(2, 2, 3)
    nn.init.zeros_(layer.weight)
    (norms,) = operator_norms(layer, torch.randn(1, 2, 5, 5)).layers
    assert norms.operator == norms.matrix == norms.bound == 0


@pytest.mark.parametrize(
    ("model", "iterations", "message"),
    [
        (nn.ReLU(), 10, "no convolution or linear layer"),
        (nn.Linear(3, 3), 0, "iterations=0"),
        (nn.Linear(4, 3), 10, "failed on the given inputs"),
    ],
)
def test_errors(model: nn.Module, iterations: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        operator_norms(model, torch.randn(2, 3), iterations=iterations)
