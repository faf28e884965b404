"""A plan that says exact keeps the eval function, whatever the layers' numbers are."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normsearch import METHODS, convert, convert_state_dict, find_sites, plan

torch.set_num_threads(1)

#: Every method, and the options on which exactness depends.
SPELLINGS = [
    *METHODS,
    *("frozen(trainable=true)", "weight(mean_only=true)", "spectral(gain=fixed)"),
    *("switchable(bn_logit=39)", "switchable(bn_logit=40)", "switchable(bn_logit=100)"),
]


@st.composite
def layers(draw: st.DrawFn) -> nn.BatchNorm2d:
    """Draw a BatchNorm of four channels, each of its tensors at its initial values or not."""
    layer = nn.BatchNorm2d(
        4,
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
        dtype=torch.float64,
    )
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    with torch.no_grad():
        if layer.affine:
            gamma = draw(st.sampled_from(["one", "zero", "half", "random"]))
            if gamma == "random":
                layer.weight.normal_(generator=numbers)
            else:
                layer.weight.fill_({"one": 1.0, "zero": 0.0, "half": 0.5}[gamma])
            if draw(st.booleans()):
                layer.bias.normal_(generator=numbers)
        if layer.track_running_stats:
            if draw(st.booleans()):
                layer.running_mean.normal_(generator=numbers)
            if draw(st.booleans()):
                layer.running_var.uniform_(0.3, 3, generator=numbers)
            layer.num_batches_tracked.fill_(draw(st.sampled_from([0, 7])))
    return layer


def network(first: nn.Module, second: nn.Module) -> nn.Sequential:
    """Return a site that a convolution may take up, and one that it may not."""
    torch.manual_seed(0)
    between = [nn.Conv2d(3, 4, 3, dtype=torch.float64), first, nn.ReLU()]
    return nn.Sequential(*between, nn.Conv2d(4, 4, 1, dtype=torch.float64), nn.Tanh(), second).eval()


def images() -> Tensor:
    """Return a batch, always the same."""
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("given_inputs", [False, True])
@given(first=layers(), second=layers())
@settings(max_examples=15, deadline=None)
def test_what_a_plan_calls_exact_is(
    spelling: str, given_inputs: bool, first: nn.Module, second: nn.Module
) -> None:
    model, x = network(copy.deepcopy(first), copy.deepcopy(second)), images()
    inputs = x if given_inputs else None
    the_plan = plan(model, [spelling, "batch"], inputs=inputs)
    exact = [site.path for site in the_plan.sites if the_plan[site.path].exact_at(site)]
    only = plan(model, [spelling, "batch"], inputs=inputs, where=lambda site: site.path in exact)
    assert only.exact
    with torch.no_grad():
        after, before = convert(model, only, inputs=inputs)(x), model(x)
    # A batch of equal numbers, normalized by itself, is rounding and nothing else.
    assert torch.linalg.vector_norm(after - before) <= 1e-10 * torch.linalg.vector_norm(before) + 1e-11


@torch.no_grad()
def learned_affine() -> nn.Sequential:
    """Return a network of initial statistics whose γ and β are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)).double().eval()
    model[1].weight.uniform_(0.5, 2)
    model[1].bias.normal_()
    return model


@pytest.mark.parametrize(
    "spelling", ["weight", "weight(mean_only=true)", "spectral", "switchable(bn_logit=40)"]
)
def test_a_learned_scale_and_shift_are_kept_where_statistics_are_initial(spelling: str) -> None:
    model, x = learned_affine(), images()
    the_plan = plan(model, spelling, inputs=x)
    assert the_plan.exact
    assert the_plan.sites[0].trained
    converted = convert(model, the_plan, inputs=x)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)
    loaded = convert(model, the_plan)
    loaded.load_state_dict(convert_state_dict(model.state_dict(), the_plan))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("weight", "bias", "trained"),
    [(1.0, 0.0, False), (0.0, 0.0, False), (0.5, 0.0, True), (1.0, 0.1, True), (0.0, 0.1, True)],
)
def test_a_scale_that_starts_at_zero_was_not_learned(weight: float, bias: float, trained: bool) -> None:
    layer = nn.BatchNorm2d(4)
    nn.init.constant_(layer.weight, weight)
    nn.init.constant_(layer.bias, bias)
    assert find_sites(layer)[0].trained is trained


def test_what_is_drawn_anew_is_not_called_exact() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for spelling in ("weight", "weight(mean_only=true)"):
        the_plan = plan(model, spelling)
        assert not the_plan.exact
        assert "drawn anew" in the_plan.rows[0].notes[-1]
    the_plan = plan(model, "switchable(bn_logit=40)")
    assert not the_plan.exact
    assert the_plan.rows[0].notes == ("untrained: the three parts start equal, whatever bn_logit is",)


def test_an_exported_program_knows_a_learned_scale() -> None:
    model, x = learned_affine(), images()
    program = torch.export.export(model, (x,))
    assert plan(program, "switchable(bn_logit=40)").exact
    converted = convert(program, "weight", inputs=x).module()
    torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)
