"""Weight-space methods: the layer before a site takes the scale over, or an affine stays at the site."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import WEIGHT_REFERENCES
from test_methods import trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normsearch
from normsearch import METHODS, NormSite, convert, find_sites, parse_method
from normsearch.methods import ChannelAffine, MeanOnlyBatchNorm
from normsearch.methods.spectral import SpectralNorm

SPELLINGS = tuple(WEIGHT_REFERENCES)
EXACT = [spelling for spelling in SPELLINGS if parse_method(spelling).exact]
#: (layer, input shape): every kind of producer.
PRODUCERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (3, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), (3, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="reflect"), (3, 6, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (3, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (3, 4, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 4, 4)),
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
}


def network(kind: str, between: nn.Module | None = None) -> tuple[nn.Sequential, Tensor]:
    """A producer, perhaps something between, and a trained BatchNorm, in double precision; and an input."""
    make, shape = PRODUCERS[kind]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layers = [layer] if between is None else [layer, between]
    return nn.Sequential(*layers, trained(tuple(layer(x).shape))).eval(), x


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


class _Products(TorchDispatchMode):
    """Count products of a matrix and a vector."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mv.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_iterated_on_the_meta_device() -> None:
    # torch takes milliseconds for each product of nothing: half a minute for a deep network.
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    with _Products() as products:
        converted = convert(model, "spectral(gain=fixed)", inputs=torch.empty(1, 4, 5, 5, device="meta"))
    assert converted[0].left.shape == (6,)
    assert converted[0].right.shape == (4 * 9,)
    assert converted[0].left.is_meta
    assert products.count == 1


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("spelling", EXACT)
def test_exact_where_the_producer_takes_the_scale(spelling: str, kind: str) -> None:
    model, x = network(kind)
    with torch.no_grad():
        model[0].weight.view(-1)[:3] = 0
    converted = convert(model, spelling, inputs=x)
    assert distance(converted(x), model(x)) < 1e-12
    expected = MeanOnlyBatchNorm if "mean_only" in spelling else nn.Identity
    assert isinstance(converted[1], expected)


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("spelling", [s for s in EXACT if s != "identity"])
def test_exact_where_an_affine_must_stay_at_the_site(spelling: str, kind: str) -> None:
    model, x = network(kind, nn.GELU())
    converted = convert(model, spelling, inputs=x)
    assert distance(converted(x), model(x)) < 1e-12
    assert isinstance(converted[2], MeanOnlyBatchNorm if "mean_only" in spelling else ChannelAffine)
    assert converted[2].weight.requires_grad
    assert type(converted[0]) is not type(model[0])


def test_identity_refuses_where_something_lies_between() -> None:
    model, x = network("conv2d", nn.GELU())
    with pytest.raises(normsearch.RefusedError, match=r"2: identity refused: .*lie between.*choose frozen"):
        convert(model, "identity", inputs=x)


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_weight_equals_its_slow_reference_after_training(spelling: str, kind: str) -> None:
    model, x = network(kind)
    layer = convert(model, spelling, inputs=x)[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for _ in range(300):
        # Power iteration catches up with the moved weight, a step at each use.
        layer.train()(x)
    layer.eval()
    transposed, groups = getattr(layer, "transposed", False), getattr(layer, "groups", 1)
    wanted = WEIGHT_REFERENCES[spelling](dict(layer.state_dict()), transposed, groups)
    assert torch.allclose(layer.weight, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["conv2d", "grouped transposed", "linear"])
@pytest.mark.parametrize(
    "spelling", ["weight", "weight(mean_only=true)", "spectral", "group(weight_standardization=true)"]
)
def test_gradients_are_those_of_the_formula(spelling: str, kind: str) -> None:
    model, x = network(kind)
    converted = convert(model, spelling, inputs=x)
    names = [name for name, _ in converted.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(converted, dict(zip(names, parameters, strict=True)), (x,))

    variables = [x, *(parameter.detach().clone() for parameter in converted.parameters())]
    assert torch.autograd.gradcheck(run, [variable.requires_grad_() for variable in variables])


@pytest.mark.parametrize("spelling", ["weight", "spectral"])
def test_zero_filters_and_zero_gamma_stay_finite(spelling: str) -> None:
    model, x = network("conv2d")
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.zero_()
    converted = convert(model, spelling).train()
    converted(x).square().sum().backward()
    assert torch.equal(converted(x), model(x))
    assert all(torch.isfinite(parameter.grad).all() for parameter in converted.parameters())


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["conv2d", "grouped transposed", "linear"])
def test_pickles_copies_saves_and_carries_state_dicts(spelling: str, kind: str) -> None:
    model, x = network(kind)
    plan = normsearch.plan(model, spelling, inputs=x)
    converted = convert(model, plan)
    wanted = converted(x)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), wanted)
    assert torch.equal(copy.deepcopy(converted)(x), wanted)
    fresh = convert(copy.deepcopy(model), plan)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(normsearch.convert_state_dict(model.state_dict(), plan))
    assert torch.equal(fresh(x), wanted)
    assert normsearch.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("spelling", ["weight", "spectral", "identity"])
def test_trains_in_place_with_its_optimizer(spelling: str) -> None:
    model, x = network("conv2d")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.train()(x).sum().backward()
    optimizer.step()
    convert(model, spelling, in_place=True, optimizer=optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))
    before = model(x).square().mean()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    assert model(x).square().mean() < 0.8 * before


class Shared(nn.Module):
    """One convolution read by a BatchNorm and by something else; one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = trained((2, 4, 5, 5), dtype=torch.float32)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = trained((2, 4, 5, 5), seed=1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y) + y.relu()
        return self.bn2(self.twice(self.twice(z)))


def test_never_folds_into_a_layer_that_others_read_or_that_runs_twice() -> None:
    model, x = Shared().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    details = [site.producer.detail for site in find_sites(model) if site.producer]
    assert details == ["its output is read elsewhere too", "it is called 2 times per forward pass"]
    for spelling in ("weight", "spectral", "weight(mean_only=true)"):
        assert distance(convert(model, spelling)(x), model(x)) < 1e-12


class Auxiliary(nn.Module):
    """A convolution that an auxiliary head reads in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), trained((2, 4, 5, 5), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.mean() if self.training else self.bn(y)


def test_never_folds_where_train_mode_reads_the_layer_differently() -> None:
    (site,) = find_sites(Auxiliary())
    assert site.producer is not None
    assert not site.producer.foldable
    assert "train mode" in str(site.producer.detail)


class ReadElsewhere(nn.Module):
    """The convolution's weight is used a second time, by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), trained((2, 4, 5, 5), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


class Hooked(nn.Sequential):
    """A hook looks at what the BatchNorm is given."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), trained((2, 4, 5, 5), dtype=torch.float32))
        self[1].register_forward_hook(lambda module, inputs, output: output + inputs[0])


@pytest.mark.parametrize("make", [ReadElsewhere, Hooked])
def test_never_folds_where_others_would_see_the_change(make: type[nn.Module]) -> None:
    model, x = make().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for spelling in ("weight", "spectral", "weight(mean_only=true)", "identity"):
        assert distance(convert(model, [spelling, "frozen"])(x), model(x)) < 1e-12, spelling


@pytest.mark.parametrize("spelling", EXACT)
def test_state_dict_of_layers_with_two_names_is_folded_once(spelling: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), trained((2, 4, 5, 5), dtype=torch.float32)
            self.seq = nn.Sequential(self.conv, self.bn)

        def forward(self, x: Tensor) -> Tensor:
            return self.seq(x)

    model, x = Twice().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plan = normsearch.plan(model, spelling)
    converted = convert(model, plan)
    converted.load_state_dict(normsearch.convert_state_dict(model.state_dict(), plan))
    assert distance(converted(x), model(x)) < 1e-12


def test_linear_layer_is_folded_only_where_its_features_are_the_channels() -> None:
    # Four tokens of four features: BatchNorm1d(4) reads the tokens as channels.
    model = nn.Sequential(nn.Linear(3, 4), trained((2, 4, 4))).double().eval()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    for inputs in (None, x):
        (site,) = find_sites(model, inputs)
        assert site.producer is not None
        assert not site.producer.foldable
        assert distance(convert(model, "weight", inputs=inputs)(x), model(x)) < 1e-12


class Branching(nn.Module):
    """Cannot be traced: it looks at its input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), trained((2, 4, 5, 5), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.mean() < 1e9 else x


def test_untraceable_model_finds_the_upstream_weight_by_a_forward_pass_and_never_folds() -> None:
    model, x = Branching().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(normsearch.RefusedError, match="choose frozen, or give inputs=: a forward pass shows"):
        convert(model, "weight")
    converted = convert(model, "weight", inputs=x)
    assert isinstance(converted.bn, ChannelAffine)
    assert distance(converted(x), model(x)) < 1e-12


def test_forward_that_branches_on_an_optional_argument_is_traced_with_its_default() -> None:
    class Optional(Branching):
        def forward(self, x: Tensor, early: bool = False) -> Tensor:
            y = self.conv(x)
            return y if early else self.bn(y.relu())

    model, x = Optional().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    (site,) = find_sites(model)
    assert site.producer is not None
    assert (site.producer.path, site.producer.foldable) == ("conv", False)
    assert distance(convert(model, "weight")(x), model(x)) < 1e-12
    assert torch.equal(convert(model, "weight")(x, True), model(x, True))


def test_analysis_leaves_caches_of_the_model_alone() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, Tensor] = {}
            self.bias = nn.Parameter(torch.zeros(4, 1, 1))
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.cache["bias"] = self.bias * 2
            return self.bn(self.conv(x)) + self.cache["bias"]

    model = Caching()
    find_sites(model)
    find_sites(model, torch.randn(2, 3, 5, 5))
    assert model.cache == {}
    copy.deepcopy(model)


@pytest.mark.parametrize("spelling", ["weight", "weight(mean_only=true)"])
@pytest.mark.parametrize("between", [None, nn.Tanh()])
def test_data_dependent_initialisation_standardizes_an_untrained_network(
    spelling: str, between: nn.Module | None
) -> None:
    torch.manual_seed(0)
    middle = [] if between is None else [between]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        *middle,
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        *middle,
        nn.BatchNorm2d(8),
    )
    x = torch.randn(32, 3, 12, 12) * 5 + 2
    converted = convert(model, spelling, inputs=x).eval()
    seen = []
    for layer in converted:
        if isinstance(layer, nn.Identity | ChannelAffine | MeanOnlyBatchNorm):
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
    converted(x)
    assert len(seen) == 2
    for y in seen:
        assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(y.var((0, 2, 3)), torch.ones(8), atol=1e-2)
    if between is None:
        assert 0.04 < float(converted[0].weight_v.detach().std()) < 0.06


def test_trained_network_is_not_initialised_anew() -> None:
    model, x = network("conv2d")
    assert distance(convert(model, "weight", inputs=x)(x), model(x)) < 1e-12


def test_weight_sites_are_listed_and_converted_only_when_asked_for() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 2)
    )
    x = torch.randn(2, 3, 7, 7)
    assert [site.path for site in find_sites(model)] == ["1"]
    assert [(site.path, site.kind) for site in find_sites(model, weights=True)][1:] == [
        ("2", "weight"),
        ("4", "weight"),
    ]
    converted = convert(model.eval(), "spectral", weights=True)
    assert distance(converted(x), model(x)) < 1e-5
    assert [type(layer).__name__ for layer in converted][::2] == ["SpectralNormConv2d"] * 2 + [
        "SpectralNormLinear"
    ]
    with pytest.raises(normsearch.RefusedError, match="has no BatchNorm, only a weight"):
        normsearch.plan(model, "group", weights=True)


def test_fixed_gain_bounds_every_layer() -> None:
    model, x = network("conv2d")
    converted = convert(model, "spectral(gain=fixed)")
    assert float(torch.linalg.svdvals(converted[0].weight.detach().flatten(1))[0]) == pytest.approx(
        1, abs=1e-2
    )
    # The outputs keep their directions: only their common length changes.
    a, b = converted(x).detach().flatten(), model(x).detach().flatten()
    assert float(a @ b / (a.norm() * b.norm())) == pytest.approx(1, abs=1e-6)
    with pytest.raises(normsearch.RefusedError, match="would be unbounded at the site"):
        convert(network("conv2d", nn.GELU())[0], "spectral(gain=fixed)")


def test_power_iteration_follows_a_moving_weight_in_train_mode_only() -> None:
    model, x = network("conv2d")
    layer = convert(model, "spectral")[0]
    before = layer.left.clone()
    layer.eval()(x)
    assert torch.equal(layer.left, before)
    with torch.no_grad():
        layer.weight_orig.copy_(torch.randn_like(layer.weight_orig))
    for _ in range(100):
        layer.train()(x)
    assert float(layer.sigma().detach()) == pytest.approx(
        float(torch.linalg.svdvals(layer.weight_orig.detach().flatten(1))[0]), rel=1e-4
    )


@pytest.mark.parametrize("spelling", ["weight", "weight(mean_only=true)", "spectral"])
def test_compiles_and_trains_in_low_precision(spelling: str) -> None:
    model, x = network("conv2d")
    converted = convert(model, spelling)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(converted, backend="aot_eager")(x), converted(x), rtol=1e-10)
    low = converted.bfloat16().train()
    low(x.bfloat16()).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in low.parameters())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(EXACT),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_exact_for_any_convolution(
    spelling: str, groups: int, per_input: int, per_output: int, transposed: bool, bias: bool
) -> None:
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = cls(
        groups * per_input, groups * per_output, (2, 3), groups=groups, bias=bias, dtype=torch.float64
    )
    x = torch.randn(2, groups * per_input, 4, 5, dtype=torch.float64)
    model = nn.Sequential(layer, trained(tuple(layer(x).shape))).eval()
    if float(model(x).detach().norm()) > 0:
        assert distance(convert(model, spelling)(x), model(x)) < 1e-10


def test_mean_only_moves_its_running_mean_as_batchnorm_does() -> None:
    model, x = network("conv2d")
    converted = convert(model, "weight(mean_only=true)").train()
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    model.train()(x)
    converted(x)
    assert torch.allclose(converted[1].running_mean, scale * model[1].running_mean, rtol=1e-10)


def test_nested_sites_share_one_upstream_layer() -> None:
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3), trained((2, 4, 5, 5)), nn.ReLU(), trained((2, 4, 5, 5), seed=4))
        .double()
        .eval()
    )
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    sites: tuple[NormSite, ...] = find_sites(model)
    assert all(a.producer and b.producer and a.producer.path == b.producer.path for a, b in pairwise(sites))
    for spelling in ("weight", "spectral", "weight(mean_only=true)"):
        plan = normsearch.plan(model, spelling)
        converted = convert(model, plan)
        assert distance(converted(x), model(x)) < 1e-12
        converted.load_state_dict(normsearch.convert_state_dict(model.state_dict(), plan))


def test_method_count() -> None:
    assert {name for name, method in METHODS.items() if method().needs_producer} == {
        *("weight", "spectral", "identity", "evonorm_s0"),
    }


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_eval_after_training_finds_the_largest_singular_value(kind: str) -> None:
    model, x = network(kind)
    layer = convert(model, "spectral(gain=fixed)", inputs=x)[0]
    layer.train()
    with torch.no_grad():
        # A weight that moved far: one power iteration does not follow.
        layer.weight_orig.copy_(torch.randn_like(layer.weight_orig))
        layer(x)
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) > 1.01
        layer.eval()
        torch.testing.assert_close(
            torch.linalg.matrix_norm(layer.weight.flatten(1), 2), torch.ones_like(x[(0,) * x.dim()])
        )


def test_training_mode_without_a_step_leaves_the_exact_function_alone() -> None:
    model, x = network("conv2d")
    converted = convert(model, "spectral").train()
    for _ in range(3):
        converted(x)
    torch.testing.assert_close(converted.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weight_norms_closed_gradient_is_autograds(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=layout)
    model = nn.Sequential(conv, nn.BatchNorm2d(4).double())
    layer = convert(model, "weight")[0]
    with torch.no_grad():
        layer.weight_g.copy_(torch.tensor([1.5, -0.7, 0.0, 2.0]))
        layer.weight_v[3] = 0
    direction = torch.randn(4, 3, 3, 3, dtype=torch.float64).to(memory_format=layout)
    got = torch.autograd.grad((layer.weight * direction).sum(), (layer.weight_v, layer.weight_g))
    norm = layer.weight_v.square().sum((1, 2, 3)).clamp_min(1e-300).sqrt()
    slow = layer.weight_v * (layer.weight_g / norm).reshape(-1, 1, 1, 1)
    wanted = torch.autograd.grad((slow * direction).sum(), (layer.weight_v, layer.weight_g))
    torch.testing.assert_close(got[0][:3], wanted[0][:3], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-12, atol=1e-14)
    assert all(part.isfinite().all() for part in got)


def test_weight_norm_has_second_derivatives() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    layer = convert(model, "weight", inputs=torch.randn(5, 4, dtype=torch.float64))[0]

    def weight(v: Tensor, g: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_v": v, "weight_g": g}, (torch.eye(4).double(),))

    v, g = (part.detach().clone().requires_grad_() for part in (layer.weight_v, layer.weight_g))
    assert torch.autograd.gradcheck(weight, (v, g))
    assert torch.autograd.gradgradcheck(weight, (v, g))


@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e25])
@pytest.mark.parametrize("kind", ["drawn", "one direction", "two largest", "rank one", "orthogonal", "zero"])
def test_the_largest_singular_value_of_large_weights(kind: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if kind == "one direction":
        values[0] = 1e4
    elif kind == "two largest":
        values[0] = values[1] = 40.0
    elif kind == "rank one":
        values[1:] = 0.0
    elif kind == "orthogonal":
        values[:] = 3.0
    elif kind == "zero":
        values[:] = 0.0
    layer = nn.Linear(200, 300, bias=False)
    with torch.no_grad():
        layer.weight.copy_((left * values) @ right * scale)
    largest = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    for _ in range(2):
        normalized = SpectralNorm.normalized(layer, None, gain=True)
        assert float(normalized.sigma().detach().double()) == pytest.approx(largest, rel=1e-6, abs=0)
        # The other way round: more columns than rows.
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous())
