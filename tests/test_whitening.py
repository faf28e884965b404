"""``whiten=true``: the layer before a site brings its input to mean 0 and variance 1, without data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from normsearch import RefusedError, convert, convert_state_dict, plan

METHODS = ("group(groups=2, whiten=true)", "layer(whiten=true)", "rms(whiten=true)")


def network(bias: bool = True, affine: bool = True) -> nn.Sequential:
    """A convolution whose channels differ by orders of magnitude, and a BatchNorm that has seen them."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, affine=affine, momentum=None)
    model = nn.Sequential(conv, norm).double()
    with torch.no_grad():
        conv.weight.mul_(torch.logspace(-2, 1, 8, dtype=torch.float64)[:, None, None, None])
        if affine:
            norm.weight.copy_(torch.randn(8))
            norm.bias.copy_(torch.randn(8))
    model.train()(images(64, 0))
    return model.eval()


def images(count: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 9, 9, generator=generator, dtype=torch.float64)


def slow(model: nn.Sequential, x: Tensor, spelling: str) -> Tensor:
    """γ·norm(x̂)·√(σ_g² + eps) + β + γ (μ_g) with x̂ = (x − μ)/√(σ² + eps), one sample and group at a time."""
    conv, norm = model
    y = conv(x)
    mean, variance, eps = norm.running_mean, norm.running_var, norm.eps
    gamma = torch.ones(8).double() if norm.weight is None else norm.weight.detach()
    beta = torch.zeros(8).double() if norm.bias is None else norm.bias.detach()
    white = (y - mean[:, None, None]) / (variance + eps).sqrt()[:, None, None]
    expected = variance / (variance + eps)
    out = torch.empty_like(white)
    size = 4 if spelling.startswith("group") else 8
    for n in range(len(x)):
        for start in range(0, 8, size):
            part = slice(start, start + size)
            values = white[n, part]
            centre = 0.0 if spelling.startswith("rms") else values.mean()
            spread = (values - centre).square().mean()
            scale = (expected[part].mean() + eps).sqrt() / (spread + eps).sqrt()
            out[n, part] = (values - centre) * scale
    return out * gamma[:, None, None] + beta[:, None, None]


@pytest.mark.parametrize("spelling", METHODS)
@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, True), (True, False)])
def test_equals_the_formula(spelling: str, bias: bool, affine: bool) -> None:
    model = network(bias, affine)
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, spelling)
    assert torch.allclose(converted(images()), slow(model, images(), spelling), rtol=1e-9, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("spelling", METHODS)
def test_keeps_more_of_the_function_where_scales_differ(spelling: str) -> None:
    model, x = network(), images()
    folded = spelling.replace(", whiten=true", "").replace("(whiten=true)", "")
    off = [float((convert(model, to)(x) - model(x)).detach().square().mean()) for to in (folded, spelling)]
    assert off[1] < 0.5 * off[0]


def test_says_where_it_whitens_and_why_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    for norm in (model[2], model[4]):
        norm.running_var.fill_(3.0)
    model.append(nn.Conv2d(8, 8, 1)).append(nn.BatchNorm2d(8)).append(nn.BatchNorm2d(8))
    model[7].running_mean.fill_(1.0)
    for spelling in ("group(whiten=true)", "layer(whiten=true)", "rms(whiten=true)"):
        notes = {row.site.path: " ".join(row.notes) for row in plan(model, spelling).rows}
        assert "its input is whitened in 3" in notes["4"]
        assert "not whitened: 0: " in notes["2"]
        assert "not whitened: untrained" in notes["6"]
        assert "not whitened" in notes["7"]
        converted = convert(model, spelling)
        plain = convert(model, spelling.replace("(whiten=true)", ""))
        # What is not whitened is folded as ever.
        for path in ("2", "6", "7"):
            for name, value in plain.get_submodule(path).state_dict().items():
                assert torch.equal(converted.get_submodule(path).state_dict()[name], value)
        assert torch.equal(converted[0].weight, model[0].weight)
        assert not torch.equal(converted[3].weight, model[3].weight)


def test_a_checkpoint_follows() -> None:
    model = network(bias=False)
    the_plan = plan(model, "layer(whiten=true)")
    converted = convert(model, the_plan)
    state = convert_state_dict(model.state_dict(), the_plan)
    assert set(state) == set(converted.state_dict())
    assert all(torch.equal(state[name], value) for name, value in converted.state_dict().items())


def test_standardized_filters_whiten_too() -> None:
    model, x = network(), images()
    both = convert(model, "group(groups=2, whiten=true, weight_standardization=true)")
    assert torch.allclose(both(x), convert(model, "group(groups=2, whiten=true)")(x), atol=1e-10)
    with pytest.raises(RefusedError, match="no convolution or linear layer"):
        plan(nn.Sequential(nn.BatchNorm2d(8)), "group(whiten=true, weight_standardization=true)")


def test_frozen_parameters_stay_frozen() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    converted = convert(model, "group(whiten=true)")
    assert not any(parameter.requires_grad for parameter in converted.parameters())
