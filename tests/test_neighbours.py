"""What is particular to the neighbouring methods: chunks, halves, schedules, gates, thresholds, filters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import REFERENCES
from reference import sparsestmax as slow_sparsestmax
from test_methods import _train_towards_instance_norm, built, scrambled, state_of, trained
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import normsearch
from normsearch import (
    Plan,
    PlanError,
    RefusedError,
    ShapeError,
    convert,
    plan,
)
from normsearch.methods import (
    EvoNormS0,
    FilterResponseNorm,
    GhostBatchNorm,
    InstanceBatchNorm,
    StandardizedWeight,
)
from normsearch.methods.sparse_switchable import CORNER, sparsestmax

torch.set_num_threads(1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def as_expected(channels: int, act: nn.Module | None) -> tuple[nn.Sequential, Tensor]:
    """A network whose BatchNorm sees in every sample the very statistics that it has, and its input."""
    white = noise(3, channels, 6, 6)
    white = white - white.mean((2, 3), keepdim=True)
    white = white / white.square().mean((2, 3), keepdim=True).sqrt()
    model = nn.Sequential(
        nn.Conv2d(channels, channels, 1), trained((3, channels, 6, 6)), *([] if act is None else [act])
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(noise(channels, seed=1) + 2)[..., None, None])
        model[0].bias.copy_(noise(channels, seed=2))
        model[1].running_mean.copy_(model[0].bias)
        model[1].running_var.copy_(model[0].weight.flatten(1).diagonal().square())
    return model.eval(), white


@pytest.mark.parametrize(
    "spelling", ["filter_response", "evonorm_s0", "evonorm_s0(groups=2)", "ibn", "sparse_switchable"]
)
@pytest.mark.parametrize("act", [None, nn.Tanh()])
def test_folding_keeps_the_function_where_statistics_are_the_expected_ones(
    spelling: str, act: nn.Module | None
) -> None:
    model, x = as_expected(6, act)
    assert distance(convert(model, spelling)(x), model(x)) < 1e-12


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "closest", "most"),
    [
        (nn.SiLU(), 1.0, 1e-12),
        (nn.GELU(), 1.702, 0.03),
        (nn.Hardswish(), 0.785, 0.1),
        (nn.ReLU(), 8.0, 0.05),
    ],
)
def test_evonorm_takes_the_place_of_activations_that_its_gate_can_be(
    act: nn.Module, closest: float, most: float
) -> None:
    model, x = as_expected(6, act)
    converted = convert(model, "evonorm_s0(groups=2)")
    assert [type(layer) for layer in converted] == [nn.Conv2d, EvoNormS0, nn.Identity]
    assert torch.equal(converted[1].v.detach(), torch.full((6,), closest, dtype=torch.float64))
    assert torch.equal(converted[1].bias.detach(), torch.zeros(6))
    assert distance(converted(x), model(x)) < most


@pytest.mark.parametrize("keep", ["affine", "nothing"])
def test_evonorm_of_an_untrained_layer_starts_as_in_the_paper(keep: Any) -> None:
    model, _ = as_expected(48, nn.ReLU())
    converted = convert(model, "evonorm_s0", keep=keep)
    assert converted[1].groups == 3
    assert torch.equal(converted[1].v.detach(), torch.ones(48))
    assert torch.equal(converted[0].weight, model[0].weight)
    # The same structure as with the function kept: one state dict fits both.
    wanted = convert(model, "evonorm_s0").state_dict()
    assert {k: v.shape for k, v in converted.state_dict().items()} == {k: v.shape for k, v in wanted.items()}


def test_evonorm_without_an_activation_still_normalizes() -> None:
    model, _ = as_expected(6, None)
    layer = convert(model, "evonorm_s0")[1].eval()
    y = noise(2, 6, 5, 5)
    assert distance(layer(100 * y) - layer.bias[:, None, None], layer(y) - layer.bias[:, None, None]) < 1e-4
    # And may learn to bend.
    layer(y).square().sum().backward()
    assert torch.equal(layer.v.grad != 0, layer.weight != 0)


def test_evonorm_leaves_the_activation_where_the_shift_cannot_be_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), trained((2, 6, 3, 3)), nn.ReLU()).double()
    the_plan = plan(model, "evonorm_s0")
    assert the_plan.rows[0].notes == ("the ReLU that follows (3) stays: the layer starts linear",)
    assert isinstance(convert(model, the_plan)[3], nn.ReLU)


def test_filter_response_takes_the_place_of_a_relu() -> None:
    model, x = as_expected(6, nn.ReLU())
    the_plan = plan(model, "filter_response", inputs=x)
    assert the_plan.rows[0].notes == ("takes the place of the ReLU that follows (2)",)
    converted = convert(model, the_plan)
    assert [type(layer) for layer in converted] == [nn.Conv2d, FilterResponseNorm, nn.Identity]
    assert distance(converted(x), model(x)) < 1e-12
    y = converted(x)
    y.sum().backward()
    # Where the output is clipped the threshold learns.
    clipped = (y == 0).any(0).flatten(1).any(1)
    assert torch.equal(converted[1].tau.grad != 0, clipped)
    assert clipped.sum() >= 4


class Shared(nn.Module):
    """Like torchvision's blocks: one ReLU for both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 6, 3), trained((2, 6, 4, 4)), trained((2, 6, 4, 4))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.relu(self.bn1(self.conv(x)))))


class Called(Shared):
    """The activation is a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)))


class ReadTwice(Shared):
    """The layer's output is added to the activation's."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv(x))
        return self.relu(y) + y


class Auxiliary(Shared):
    """In train mode a head reads the layer too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv(x))
        return self.relu(y) + y.mean() if self.training else self.relu(y)


class Watched(Shared):
    """A hook looks at what the activation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.relu.register_forward_hook(lambda module, inputs, output: output + inputs[0].mean())

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv(x)))


class Clipped(Shared):
    """Not a ReLU, but one that is clipped above too."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv(x)))


class Branching(Shared):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv(x))) if x.mean() < 1e9 else x


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Shared, "the ReLU that follows (relu) stays, because it is called 2 times per forward pass"),
        (Called, "the relu that follows stays, because it is a call in a forward method, not a module"),
        (ReadTwice, "the ReLU that follows (relu) stays, because what it reads is read elsewhere too"),
        (Auxiliary, "the ReLU that follows (relu) stays, because in train mode the site is read differently"),
        (Watched, "the ReLU that follows (relu) stays, because it has forward hooks, which would see other"),
        (Clipped, "the ReLU6 that follows (relu) stays"),
        (Branching, "no activation is known to follow"),
    ],
)
@pytest.mark.parametrize("spelling", ["filter_response", "evonorm_s0"])
def test_activation_stays_where_it_is_not_proved_to_be_the_sites_alone(
    spelling: str, make: Callable[[], nn.Module], why: str
) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    the_plan = plan(model, {"bn1": spelling})
    assert any(note.startswith(why) for note in the_plan.rows[0].notes), the_plan.rows[0].notes
    converted = convert(model, the_plan)
    assert type(converted.relu) is type(model.relu)
    if spelling == "filter_response":
        assert converted.bn1.tau is None
    else:
        assert not converted.bn1.v.any()
    assert Plan.from_json(the_plan.to_json()) == the_plan


@pytest.mark.parametrize("spelling", ["filter_response", "evonorm_s0"])
def test_modules_that_do_nothing_are_looked_through(spelling: str) -> None:
    model, _ = as_expected(6, nn.Sequential(nn.Identity(), nn.Identity(), nn.ReLU()))
    assert isinstance(convert(model, spelling)[2][2], nn.Identity)
    model[2][0].register_forward_hook(lambda module, inputs, output: output - 1)
    assert isinstance(convert(model, spelling)[2][2], nn.ReLU)


@pytest.mark.parametrize("spelling", ["filter_response", "evonorm_s0"])
def test_fused_activation_is_taken_over_without_a_trace(spelling: str) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 32, 3), BatchNormAct2d(32, act_layer=nn.ReLU)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) if spelling == "evonorm_s0" or x.mean() < 1e9 else x

    model, x = Fused().eval(), torch.randn(2, 3, 8, 8)
    converted = convert(model, spelling, inputs=x)
    assert [name for name, _ in converted.bn.named_children()] == ["norm", "drop"]
    assert isinstance(converted.bn.norm, FilterResponseNorm | EvoNormS0)
    if spelling == "filter_response":
        assert float(converted(x).detach().min()) == 0


def test_fused_dropout_between_keeps_the_activation() -> None:
    fused = BatchNormAct2d(8, act_layer=nn.ReLU, drop_layer=nn.Dropout2d)
    converted = convert(nn.Sequential(nn.Conv2d(3, 8, 3), fused), "filter_response")
    assert [type(child) for child in converted[1]] == [FilterResponseNorm, nn.Dropout2d, nn.ReLU]
    assert converted[1].norm.tau is None


@pytest.mark.parametrize("spelling", ["filter_response", "evonorm_s0"])
def test_activations_are_taken_over_in_graphs_and_wrappers_and_in_place(spelling: str) -> None:
    model, x = as_expected(6, nn.ReLU())
    wanted = convert(model, spelling)(x)
    graph = convert(fx.symbolic_trace(model), spelling)
    assert isinstance(graph, fx.GraphModule)
    assert torch.equal(graph(x), wanted)
    assert torch.equal(convert(nn.DataParallel(model), spelling).module(x), wanted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edited = convert(model, spelling, in_place=True, optimizer=optimizer)
    assert edited is model
    assert torch.equal(edited(x), wanted)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("spelling", ["filter_response", "evonorm_s0"])
def test_plan_does_not_take_an_activation_out_of_another_model(spelling: str) -> None:
    model, _ = as_expected(6, nn.ReLU())
    the_plan = plan(model, spelling)
    model[2].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(PlanError, match=r"lets '1' take the place of the activation '2'.*hooks"):
        convert(model, the_plan)


@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(2, 4, 3), (2, 4, 3, 2), (2, 3, 2, 2, 2)]))
def test_threshold_equals_its_slow_reference(training: bool, seed: int, shape: tuple[int, ...]) -> None:
    layer = scrambled(FilterResponseNorm(shape[1], dtype=torch.float64), seed).train(training)
    x = noise(*shape, seed=seed).requires_grad_()
    wanted = REFERENCES["filter_response"](x, state_of(layer), layer.eps, training)
    got = layer(x)
    assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)
    direction, variables = noise(*shape, seed=1), [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(got, variables, direction),
        torch.autograd.grad(wanted, variables, direction),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_threshold_differentiates_twice_compiles_and_has_per_sample_gradients() -> None:
    layer, x = scrambled(FilterResponseNorm(4, dtype=torch.float64)), noise(3, 4, 3, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, [x])
    torch.compiler.reset()
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).pow(3).sum()

    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.detach())
    for row, sample in enumerate(x.detach()):
        for name, gradient in torch.func.grad(loss)(parameters, sample).items():
            assert torch.allclose(together[name][row], gradient, rtol=1e-10)


@pytest.mark.parametrize("spelling", ["filter_response", "ibn"])
def test_maps_of_one_element_are_refused_by_name_and_at_run_time(spelling: str) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(RefusedError, match=rf"1: {spelling} refused: .*element"):
        plan(model, spelling, inputs=x)
    assert "unknown: checked at run time" in plan(model, spelling).rows[0].notes[-1]
    with pytest.raises(ShapeError, match=rf"^1: {spelling} got an input of shape \(2, 4, 1, 1\)"):
        convert(model, spelling)(x)
    layer = {"filter_response": FilterResponseNorm, "ibn": InstanceBatchNorm}[spelling](4)
    with pytest.raises(ShapeError, match="more than one element per sample and channel"):
        layer(torch.randn(2, 4, 1, 1))


# --- ghost, ibn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize(("samples", "sizes"), [(10, (4, 3, 3)), (8, (4, 4)), (3, (3,)), (5, (3, 2))])
def test_ghost_is_batchnorm_on_each_chunk_in_turn(
    samples: int, sizes: tuple[int, ...], momentum: float | None
) -> None:
    old = trained((samples, 3, 4, 4), momentum=momentum).train()
    layer = built("ghost(size=4)", old)
    for step in range(2):
        x = noise(samples, 3, 4, 4, seed=step) * torch.arange(1, samples + 1)[:, None, None, None]
        assert torch.allclose(layer(x), torch.cat([old(chunk) for chunk in x.split(sizes)]), rtol=1e-9)
    for name, buffer in old.named_buffers():
        assert torch.allclose(layer.get_buffer(name), buffer, rtol=1e-12), name


def test_ghost_without_running_statistics_sees_the_whole_batch_in_eval() -> None:
    old = trained((6, 3, 4, 4), track_running_stats=False)
    layer, x = built("ghost(size=2)", old), noise(6, 3, 4, 4)
    assert torch.allclose(layer.eval()(x), old.eval()(x), rtol=1e-10)
    assert distance(layer.train()(x), old.train()(x)) > 1e-3


def test_ghost_refuses_one_value_per_channel_and_leaves_synchronization() -> None:
    with pytest.raises(ShapeError, match=r"more than one value per channel in each chunk.*\(3, 4\)"):
        GhostBatchNorm(4, size=1)(torch.randn(3, 4))
    the_plan = plan(nn.SyncBatchNorm(4), "ghost")
    assert the_plan.rows[0].notes == ("no longer synchronized: chunks stay inside each process",)
    assert not convert(nn.SyncBatchNorm(4), the_plan).synchronized


@pytest.mark.parametrize("channels", [2, 5, 8])
@pytest.mark.parametrize("training", [False, True])
def test_ibn_is_instance_norm_on_the_first_half_and_batchnorm_on_the_second(
    channels: int, training: bool
) -> None:
    old, x = trained((4, channels, 3, 3)).train(training), noise(4, channels, 3, 3)
    layer, half = built("ibn", old), channels // 2
    assert isinstance(layer, InstanceBatchNorm)
    gamma, beta = old.weight[:half].detach().clone(), old.bias[:half].detach().clone()
    y, of_batch = layer(x), old(x)
    assert torch.allclose(y[:, :half], F.instance_norm(x[:, :half], weight=gamma, bias=beta), rtol=1e-9)
    assert torch.allclose(y[:, half:], of_batch[:, half:], rtol=1e-9)


def test_ibn_refuses_a_single_channel() -> None:
    with pytest.raises(RefusedError, match="a single channel has no half"):
        plan(nn.BatchNorm2d(1), "ibn")


# --- sparse_switchable ----------------------------------------------------------------------------


def _grid(steps: int) -> Tensor:
    first, second = torch.meshgrid(torch.arange(steps + 1), torch.arange(steps + 1), indexing="ij")
    inside = first + second <= steps
    a, b = first[inside].double(), second[inside].double()
    return torch.stack([a, b, steps - a - b], 1) / steps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_sparsestmax_is_the_closest_point_that_far_from_the_centre(seed: int, part: float) -> None:
    z = noise(3, seed=seed)
    p, radius = sparsestmax(z, torch.tensor(part * CORNER, dtype=torch.float64)), part * CORNER
    assert float(p.min()) >= 0
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float((p - 1 / 3).norm()) >= radius - 1e-9
    points = _grid(200)
    points = points[(points - 1 / 3).norm(dim=1) >= radius]
    assert float((p - z).norm()) <= float((points - z).norm(dim=1).min()) + 1e-12
    assert torch.allclose(p, slow_sparsestmax(z, radius), atol=1e-9)


@pytest.mark.parametrize("logits", [(0, 0, 0), (1, 1, 0), (0, 0.5, 0.5), (0.4, 0.2, 0.4)])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_sparsestmax_of_equal_logits_is_a_mixture_with_finite_gradients(
    logits: tuple[float, ...], part: float
) -> None:
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    p = sparsestmax(z, torch.tensor(part * CORNER, dtype=torch.float64))
    assert float(p.detach().sum()) == pytest.approx(1)
    assert float((p.detach() - 1 / 3).norm()) >= part * CORNER - 1e-9
    (gradient,) = torch.autograd.grad(p[0], z, allow_unused=True, materialize_grads=True)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.7])
def test_sparsestmax_gradient(part: float) -> None:
    radius = torch.tensor(part * CORNER, dtype=torch.float64)
    z = torch.tensor([0.3, 0.25, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sparsestmax(z, radius), [z])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sparse_mixture_leaves_batchnorm_where_instance_norm_is_right_and_ends_one_hot(
    optimizer: str,
) -> None:
    old = nn.BatchNorm2d(4)
    with torch.no_grad():
        old.running_mean.fill_(1.7)
        old.running_var.fill_(4.0)
    layer = built("sparse_switchable(steps=300)", old.train())
    assert layer.mixtures()[0].tolist() == pytest.approx([0.05, 0.05, 0.9])
    _train_towards_instance_norm(layer, optimizer, "logits", 10)
    assert int(layer.sparse_step) == 300
    assert [mixture.tolist() for mixture in layer.mixtures()] == [[1, 0, 0], [1, 0, 0]]
    layer.eval()
    x = noise(2, 4, 5, 5).float()
    wanted = F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_sparse_schedule_grows_in_training_only() -> None:
    layer = built("sparse_switchable(steps=4)", trained((2, 3, 4, 4))).train()
    x = noise(2, 3, 4, 4)
    radii = []
    for _ in range(6):
        radii.append(float(layer.radius()))
        layer(x)
    assert radii == pytest.approx([CORNER * part for part in (0, 0.25, 0.5, 0.75, 1, 1)])
    layer.eval()(x)
    assert int(layer.sparse_step) == 6


# --- weight standardization -----------------------------------------------------------------------


def test_standardized_filters_keep_the_function_and_learn_in_their_own_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), trained((2, 8, 4, 4))).double().eval()
    x = noise(2, 3, 6, 6)
    the_plan = plan(model, "group(groups=2, weight_standardization=true)")
    assert the_plan.rows[0].notes == ("standardizes the weight of 0",)
    converted = convert(model, the_plan)
    assert isinstance(converted[0], StandardizedWeight)
    # Exactly the filters there were: what is approximate is group normalization alone.
    assert distance(converted(x), convert(model, "group(groups=2)")(x)) < 1e-12
    converted(x).pow(3).sum().backward()
    gradient, v = converted[0].weight_v.grad.flatten(1), converted[0].weight_v.detach().flatten(1)
    # The paper's projection: no gradient along a filter's mean or scale.
    size = gradient.norm(dim=1)
    assert (gradient.sum(1).abs() <= 1e-10 * size).all()
    assert (((v - v.mean(1, keepdim=True)) * gradient).sum(1).abs() <= 1e-10 * size).all()


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 4, 1, groups=4), lambda: nn.Linear(1, 4)])
def test_constant_filters_stay_constant_and_finite(make: Callable[[], nn.Module]) -> None:
    producer = make()
    x = torch.randn(3, 1) if isinstance(producer, nn.Linear) else torch.randn(3, 4, 5, 5)
    layer = StandardizedWeight.standardized(copy.deepcopy(producer))
    assert torch.allclose(layer(x), producer(x))
    layer(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_weight_standardization_needs_a_weight() -> None:
    with pytest.raises(
        RefusedError, match="no convolution or linear layer is known to feed it; choose group"
    ):
        plan(nn.Sequential(nn.BatchNorm2d(8)), "group(weight_standardization=true)")


# --- what a plan says of a method -------------------------------------------------------------------


def test_switchable_is_exact_however_far_channel_scales_lie_apart() -> None:
    old = trained((2, 6, 5, 5)).eval()
    with torch.no_grad():
        old.running_var[:3] *= 1e16
        old.running_mean[:3] *= 1e8
    x = noise(2, 6, 5, 5) * old.running_var.sqrt()[:, None, None] + old.running_mean[:, None, None]
    wanted = old(x)
    y = built("switchable(bn_logit=40)", old)(x)
    for channel in range(1, 6):
        assert distance(y[:, channel], wanted[:, channel]) < 1e-10, channel


def test_switchable_says_that_it_is_not_exact_without_running_statistics() -> None:
    model = nn.Sequential(trained((2, 6, 5, 5), track_running_stats=False))
    the_plan = plan(model, "switchable(bn_logit=40)")
    assert not the_plan.exact
    assert "the three parts start equal" in the_plan.rows[0].notes[0]
    assert '"exact": false' in normsearch.explain(model, "switchable(bn_logit=40)").to_json()
    assert plan(nn.Sequential(trained((2, 6, 5, 5))), "switchable(bn_logit=40)").exact


def test_number_of_groups_that_does_not_divide_is_noted() -> None:
    for spelling in ("group(groups=7)", "evonorm_s0(groups=7)"):
        (row,) = plan(nn.Sequential(nn.BatchNorm2d(16)), spelling).rows
        assert "7 groups do not divide 16 channels: 4, the next number that does" in row.notes
        assert row.method is not None
        assert row.method.groups == 4  # type: ignore[attr-defined]
    assert plan(nn.Sequential(nn.BatchNorm2d(16)), "group(groups=4)").rows[0].notes == ()


COMPUTED = {
    "parametrize.remove_parametrizations": parametrizations.weight_norm,
    "remove_weight_norm": nn.utils.weight_norm,
    "remove_spectral_norm": nn.utils.spectral_norm,
    "prune.remove": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("removal", COMPUTED)
@pytest.mark.parametrize("spelling", ["weight", "spectral", "identity", "group(weight_standardization=true)"])
def test_producer_without_a_plain_weight_is_named_with_the_way_out(spelling: str, removal: str) -> None:
    model = nn.Sequential(COMPUTED[removal](nn.Conv2d(3, 4, 3)), trained((2, 4, 3, 3)))
    with pytest.raises(RefusedError, match="0, which feeds it, has no plain weight: it") as caught:
        plan(model.double(), spelling)
    assert f"; call torch.nn.utils.{removal} on it first, or choose" in str(caught.value)
    # What needs no weight is not concerned.
    assert plan(model, "evonorm_s0").changes


def test_unknown_producer_says_what_inputs_would_show() -> None:
    with pytest.raises(RefusedError, match="choose frozen, or give inputs=: a forward pass shows what feeds"):
        plan(nn.Sequential(nn.BatchNorm2d(4)), "identity")
    with pytest.raises(RefusedError, match=r"choose frozen$"):
        plan(nn.Sequential(nn.BatchNorm2d(4)), "identity", inputs=torch.randn(2, 4, 3, 3))
