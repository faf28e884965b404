"""BatchNorm layers with options, classes or parameters of their own: carried over, or refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from small_networks import FOLDING, close, images, net, trained
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normsearch import (
    PlanError,
    RefusedError,
    StateError,
    convert,
    convert_state_dict,
    find_sites,
    plan,
)

torch.set_num_threads(1)

METHODS = ["frozen", "group", "layer", "layer(axes=channel)", "rms", "batch_renorm", "batch_instance"]
METHODS += ["instance", "switchable"]
#: Methods whose new layer holds the very γ and β of the old one.
CARRYING = ["frozen", "batch_renorm", "batch_instance"]


# --- options of the layer -------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, None, 0.3])
@pytest.mark.parametrize("method", ["batch_renorm", "batch_instance", "switchable"])
def test_momentum_keeps_its_meaning(method: str, momentum: float | None) -> None:
    model = net(momentum=momentum).double().train()
    converted = convert(model, method)
    x = images().double()
    for step in range(3):
        model[:2](x + step)
        converted[:2](x + step)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(converted[1], name), getattr(model[1], name))


@pytest.mark.parametrize("momentum", [0.0, None])
@pytest.mark.parametrize("method", METHODS)
def test_layers_with_unusual_momentum_count_as_trained(method: str, momentum: float | None) -> None:
    # Momentum 0 leaves num_batches_tracked at 0 in some trained networks: the statistics decide.
    model = net(momentum=momentum)
    model[1].num_batches_tracked.zero_()
    assert find_sites(model)[0].trained
    assert find_sites(model)[0].momentum == momentum
    usual = convert(net(), method).eval()
    close(convert(model, method).eval()(images()), usual(images()))


@pytest.mark.parametrize("method", METHODS)
def test_affine_false_equals_affine_of_ones_and_zeros(method: str) -> None:
    model, twin = net(affine=False).eval(), net().eval()
    nn.init.ones_(twin[1].weight)
    nn.init.zeros_(twin[1].bias)
    twin[1].load_state_dict({**twin[1].state_dict(), **model[1].state_dict()})
    close(convert(model, method)(images()), convert(twin, method)(images()))


@pytest.mark.parametrize("method", CARRYING)
def test_a_layer_without_bias_gets_none_where_nothing_is_folded(method: str) -> None:
    model = net(bias=False).eval()
    converted = convert(model, method)
    assert converted[1].bias is None
    close(converted(images()), model(images()))


@pytest.mark.parametrize("method", FOLDING)
def test_a_layer_without_bias_gains_one_where_folding_needs_it_and_the_plan_says_so(method: str) -> None:
    model, twin = net(bias=False).eval(), net().eval()
    twin[1].load_state_dict({**twin[1].state_dict(), **model[1].state_dict(), "bias": torch.zeros(8)})
    (row,) = plan(model, method).rows
    close(convert(model, method)(images()), convert(twin, method)(images()))
    assert any("gains a bias" in note for note in row.notes)


@pytest.mark.parametrize("method", METHODS)
def test_the_state_dict_of_a_layer_without_bias_converts(method: str) -> None:
    model = net(bias=False)
    the_plan = plan(model, method)
    converted = convert(model, the_plan)
    state = convert_state_dict(model.state_dict(), the_plan)
    torch.testing.assert_close(dict(converted.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["frozen", "batch_renorm"])
def test_without_running_statistics_methods_that_need_them_refuse(method: str) -> None:
    with pytest.raises(RefusedError, match=f"1: {method} refused: the layer has no running statistics"):
        plan(net(track_running_stats=False), method)


@pytest.mark.parametrize("method", ["group", "layer", "layer(axes=channel)", "rms", "instance", "switchable"])
def test_without_running_statistics_gamma_and_beta_are_carried(method: str) -> None:
    model = net(track_running_stats=False)
    layer = convert(model, method)[1]
    torch.testing.assert_close(layer.weight, model[1].weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, model[1].bias, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_batch_instance_keeps_the_function(training: bool) -> None:
    model = net(track_running_stats=False).train(training)
    converted = convert(model, "batch_instance")
    assert converted[1].running_mean is None
    close(converted(images()), model(images()))


# --- statistics that are no statistics --------------------------------------------------------------


@pytest.mark.parametrize(
    ("buffer", "value", "words"),
    [
        ("running_var", math.nan, r"running variance is not finite in 1 of 4 channels \(nan in channel 2\)"),
        ("running_var", math.inf, "running variance is not finite"),
        ("running_var", -1.0, r"running variance is not above -eps = -1e-05 in 1 of 4 channels \(-1"),
        ("running_mean", math.inf, "running mean is not finite"),
    ],
)
@pytest.mark.parametrize("spelling", ["group", "frozen", "batch_renorm", "weight", "ghost"])
def test_broken_statistics_are_refused_by_name(spelling: str, buffer: str, value: float, words: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].num_batches_tracked.fill_(5)
    good = plan(model, spelling)
    model[1].get_buffer(buffer)[2] = value
    for to in (spelling, good):
        with pytest.raises(RefusedError, match=rf"1: {spelling}.* refused: its {words}"):
            convert(model, to)
    with pytest.raises(StateError, match=f"^1: its {words}.*repair the checkpoint"):
        convert_state_dict(model.state_dict(), good)
    # Left as it is, nothing is refused, and the plan says what is wrong.
    left = plan(model, [spelling, "batch"])
    assert left.changes == ()
    assert re.match(f"its {words}", left.rows[0].notes[0])


def test_a_variance_a_little_below_zero_is_what_batchnorm_makes_of_it() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)).double().eval()
    model[0].running_var[1] = -1e-5
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(convert(model, "frozen")(x), model(x), rtol=1e-12, atol=1e-12)


# --- classes of one's own -------------------------------------------------------------------------


class OwnForward(nn.BatchNorm2d):
    """A BatchNorm that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class SameForward(nn.BatchNorm2d):
    """A BatchNorm by another name."""


class OwnState(nn.BatchNorm2d):
    """A BatchNorm with a parameter that its forward may or may not use."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.temperature = nn.Parameter(torch.ones(1))


class WithChild(nn.BatchNorm2d):
    """A BatchNorm with a module inside that the parent's forward does not call."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Linear(channels, channels)


class WithAct(nn.BatchNorm2d):
    """A BatchNorm that carries an activation for others to call, unlike timm's fused layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Sigmoid()


@pytest.mark.parametrize(
    ("layer", "why"),
    [(OwnForward, "forward method of its own"), (OwnState, r"state of its own \(temperature\)")],
)
def test_a_subclass_with_a_meaning_of_its_own_is_refused_by_name(layer: type[nn.Module], why: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer(8), nn.BatchNorm2d(8))  # type: ignore[call-arg]
    assert [site.kind for site in find_sites(model)] == ["custom", "batch"]
    with pytest.raises(RefusedError, match=rf"1: group refused: {layer.__name__} has a? ?{why}"):
        convert(model, "group")
    converted = convert(model, "group", where=lambda site: site.kind != "custom")
    assert [type(module) for module in converted[1:]] == [layer, nn.GroupNorm]
    (note,) = plan(model, {"2": "group"}).rows[0].notes
    assert re.match(rf"{layer.__name__} has a? ?{why}", note)


def test_a_subclass_with_the_parents_forward_is_converted() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), SameForward(8))).eval()
    (site,) = find_sites(model)
    assert (site.kind, site.layer) == ("batch", f"{__name__}.SameForward")
    close(convert(model, "frozen")(images()), model(images()))


def test_a_subclass_with_a_module_inside_does_not_lose_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), WithChild(8))
    try:
        converted = convert(model, "group")
    except RefusedError as error:
        assert "gate" in str(error)  # noqa: PT017
    else:
        assert "1.gate.weight" in converted.state_dict()


def test_an_activation_that_the_layer_does_not_call_is_not_added() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), WithAct(8))).eval()
    try:
        converted = convert(model, "frozen")
    except RefusedError as error:
        assert "act" in str(error)  # noqa: PT017
    else:
        close(converted(images()), model(images()))


def test_a_patched_forward_is_refused() -> None:
    model = net()
    model[1].forward = lambda x: x
    assert find_sites(model)[0].kind == "custom"
    with pytest.raises(RefusedError, match="1: group refused: BatchNorm2d has a forward method of its own"):
        convert(model, "group")


# --- tied and parametrized parameters -------------------------------------------------------------


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    trained(model)
    model[2].weight = model[1].weight
    return model


@pytest.mark.parametrize("method", CARRYING)
@pytest.mark.parametrize("in_place", [True, False])
def test_tied_parameters_stay_tied(method: str, in_place: bool) -> None:
    model = tied().eval()
    expected = model(images())
    converted = convert(model, method, in_place=in_place)
    assert converted[1].weight is converted[2].weight
    close(converted(images()), expected)


@pytest.mark.parametrize("method", FOLDING)
def test_tied_parameters_are_refused_where_folding_would_untie_them(method: str) -> None:
    with pytest.raises(RefusedError, match=r"weight or bias is also 2\.weight, which folding.* untie"):
        convert(tied(), method)


@pytest.mark.parametrize("keep", ["affine", "nothing"])
def test_tied_parameters_are_not_untied_by_a_reset(keep: str) -> None:
    try:
        converted = convert(tied(), "batch_renorm", keep=keep)  # type: ignore[arg-type]
    except PlanError as error:
        assert "tie" in str(error)  # noqa: PT017
    else:
        assert converted[1].weight is converted[2].weight


def test_a_parameter_tied_to_another_kind_of_layer_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.PReLU(8))
    model[1].weight = model[0].weight
    assert find_sites(model)[0].tied == ("1.weight",)


class Exponential(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_a_parametrized_batch_norm_is_refused() -> None:
    model = net()
    parametrize.register_parametrization(model[1], "weight", Exponential())
    assert find_sites(model)[0].kind == "parametrized"
    with pytest.raises(RefusedError, match=r"1: .*its weight is parametrized; .*remove_parametrizations"):
        convert(model, "frozen")
    parametrize.remove_parametrizations(model[1], "weight")
    model.eval()
    close(convert(model, "frozen")(images()), model(images()))


# --- synchronized ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["frozen", "batch_renorm", "batch_instance"])
def test_synchronized_batch_norm_is_converted(method: str) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net()).eval()
    assert find_sites(model)[0].kind == "sync"
    converted = convert(model, method)
    close(converted(images()), model(images()))
    if method != "frozen":
        assert converted[1].synchronized
