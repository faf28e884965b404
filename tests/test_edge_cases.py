"""Single cases that break tools which swap layers: each is carried over, or refused with a way out."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils import parametrize

from normsearch import (
    ModelError,
    PlanError,
    RefusedError,
    ShapeError,
    convert,
    convert_state_dict,
    explain,
    find_sites,
    plan,
)

torch.set_num_threads(1)

METHODS = ["frozen", "group", "layer", "layer(axes=channel)", "rms", "batch_renorm", "batch_instance"]
METHODS += ["instance", "switchable"]
#: Methods whose new layer holds the very γ and β of the old one.
CARRYING = ["frozen", "batch_renorm", "batch_instance"]
FOLDING = ["group", "layer", "layer(axes=channel)", "rms", "instance", "switchable"]


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm the numbers of a trained one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            module.weight.uniform_(0.5, 1.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(generator=generator)
    return model


def net(channels: int = 8, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Conv2d(channels, 4, 1),
    )
    trained(model)
    return model


def images(count: int = 4, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- shared modules, frozen parameters, hooks, dtypes ---------------------------------------------


class Twice(nn.Module):
    """One BatchNorm under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.one = nn.BatchNorm2d(3)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.one(x)))


class Hiding(nn.Module):
    """Keeps a block in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
        self.blocks = [nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[0](self.seen(x))
        return y


def test_layers_in_a_plain_list_are_named() -> None:
    found = plan(Hiding(), "group")
    assert list(found) == ["seen.1"]
    (note,) = found.notes
    assert note.startswith("blocks (list) hides 1 BatchNorm layers")
    with pytest.raises(RefusedError, match="a layer that is no submodule"):
        plan(Hiding(), "group", inputs=torch.randn(2, 3, 4, 4))
    assert not plan(Hiding().seen, "group").notes


def test_a_shared_module_is_one_site_and_stays_shared() -> None:
    model = trained(Twice()).eval()
    (site,) = find_sites(model, images())
    assert (site.path, site.aliases, site.calls) == ("one", ("other",), 2)
    converted = convert(model, "frozen")
    assert converted.one is converted.other
    close(converted(images()), model(images()))


def test_a_shared_module_matches_patterns_by_any_of_its_names() -> None:
    converted = convert(trained(Twice()), {"other": "group"})
    assert isinstance(converted.one, nn.GroupNorm)
    assert converted.one is converted.other


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_frozen_parameters_stay_frozen_and_are_still_converted(method: str) -> None:
    model = net().requires_grad_(False)
    converted = convert(model, method)
    assert not isinstance(converted[1], nn.BatchNorm2d)
    assert not any(p.requires_grad for p in converted.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_requires_grad_is_kept_for_each_parameter(method: str, name: str) -> None:
    model = net()
    getattr(model[1], name).requires_grad_(False)
    layer = convert(model, method)[1]
    assert {"weight": layer.weight.requires_grad, "bias": layer.bias.requires_grad} == {
        "weight": name != "weight",
        "bias": name != "bias",
    }


def test_hooks_are_kept() -> None:
    model = net()
    shapes: list[tuple[int, ...]] = []
    model[1].register_forward_hook(lambda m, args, y: shapes.append(tuple(y.shape)))
    convert(model, "group")(images())
    assert shapes == [(4, 8, 6, 6)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_double_and_bfloat16_models_train_in_their_own_type(method: str, dtype: torch.dtype) -> None:
    converted = convert(net().to(dtype), method).train()
    output = converted(images().to(dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert {p.grad.dtype for p in converted.parameters() if p.grad is not None} == {dtype}


# --- models that cannot be pickled or copied ------------------------------------------------------


def test_a_lambda_attribute_does_not_stand_in_the_way() -> None:
    model = net().eval()
    model.scale = lambda x: 2 * x
    converted = convert(model, "frozen")
    close(converted(images()), model(images()))
    assert converted.scale(3) == 6


def test_a_local_class_does_not_stand_in_the_way() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = trained(Local()).eval()
    converted = convert(model, "frozen")
    assert type(converted) is Local
    close(converted(images()), model(images()))


def test_a_model_that_cannot_be_copied_says_so_and_is_converted_in_place() -> None:
    model = net().eval()
    model.lock = threading.Lock()
    expected = model(images())
    with pytest.raises(ModelError, match=r"Sequential cannot be copied \(TypeError.*in_place=True"):
        convert(model, "frozen")
    assert type(model[1]) is nn.BatchNorm2d
    assert convert(model, "frozen", in_place=True) is model
    assert type(model[1]).__name__ == "FrozenBatchNorm"
    close(model(images()), expected)


def test_a_lazy_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        find_sites(model, images())
    with pytest.raises(ModelError, match="cannot be copied"):
        convert(model, "group", inputs=images())


# --- wrappers -------------------------------------------------------------------------------------


def test_data_parallel_is_converted_inside() -> None:
    inner = net().eval()
    model = nn.DataParallel(inner)
    converted = convert(model, "group")
    assert type(converted) is nn.DataParallel
    assert [site.path for site in find_sites(model, images())] == ["module.1"]
    close(converted(images()), convert(inner, "group")(images()))


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", ["group", "frozen", "switchable"])
def test_a_compiled_model_converts_like_the_one_inside(method: str, in_place: bool, ran_before: bool) -> None:
    inner = net().eval()
    expected = convert(inner, method)(images())
    model = torch.compile(inner, backend="eager")
    if ran_before:
        # Compiled code of the old layers must not be reused.
        model(images())
    converted = convert(model, method, in_place=in_place)
    assert type(converted) is type(model)
    close(converted(images()), expected)
    assert [site.path for site in find_sites(converted)] == []


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_models_sites_have_the_wrappers_prefix() -> None:
    model = torch.compile(net(), backend="eager")
    (site,) = find_sites(model, images())
    assert (site.path, site.input_shapes, site.producer.path) == (
        "_orig_mod.1",
        ((4, 8, 6, 6),),
        "_orig_mod.0",
    )


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_batch_norm_runs_the_new_layer_or_is_refused(in_place: bool) -> None:
    # The wrapper holds the compiled forward of the very module that would be replaced.
    layer = trained(nn.BatchNorm2d(3)).eval()
    expected = convert(layer, "group")(images())
    model = torch.compile(layer, backend="eager")
    try:
        converted = convert(model, "group", in_place=in_place)
    except ModelError as error:
        assert "_orig_mod" in str(error)  # noqa: PT017
    else:
        close(converted(images()), expected)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_by_its_method_converts(in_place: bool) -> None:
    model = net().eval()
    expected = convert(model, "group")(images())
    model.compile(backend="eager")
    model(images())
    converted = convert(model, "group", in_place=in_place)
    close(converted(images()), expected)


def test_distributed_data_parallel_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(ModelError, match=r"DistributedDataParallel.*convert model\.module"):
            convert(model, "group")
        with pytest.raises(ModelError, match=r"1 is wrapped in DistributedDataParallel"):
            convert(nn.Sequential(nn.ReLU(), model), "group")
        assert type(convert(model.module, "group")[1]) is nn.GroupNorm
    finally:
        dist.destroy_process_group()


# --- the model is a BatchNorm ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_a_batch_norm_is_converted(method: str) -> None:
    layer = trained(nn.BatchNorm2d(8)).eval()
    x = torch.randn(4, 8, 5, 5)
    converted = convert(layer, method)
    inside = convert(nn.Sequential(layer), method)
    assert not isinstance(converted, nn.BatchNorm2d)
    assert not converted.training
    torch.testing.assert_close(converted(x), inside(x), rtol=0, atol=0)


def test_a_model_that_is_a_batch_norm_cannot_be_replaced_in_place() -> None:
    layer = trained(nn.BatchNorm2d(8))
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ModelError, match=r"the model itself is a BatchNorm2d.*without in_place"):
        convert(layer, "frozen", in_place=True)
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer.state_dict(), state)


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
    assert int(model[1].num_batches_tracked) == 0
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


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [(19, None, 1), (36, None, 2), (48, None, 3), (19, 4, 1), (30, 4, 3), (48, 32, 24), (7, 32, 7)],
)
def test_odd_channel_counts_get_a_number_of_groups_that_divides_them(
    channels: int, groups: int | None, expected: int
) -> None:
    spelling = "group" if groups is None else f"group(groups={groups})"
    converted = convert(net(channels), spelling)
    assert converted[1].num_groups == expected
    assert converted(images()).shape == (4, 4, 6, 6)


@pytest.mark.parametrize("method", METHODS)
def test_odd_channel_counts_run_and_train(method: str) -> None:
    converted = convert(net(19), method).train()
    converted(images()).square().sum().backward()
    assert torch.isfinite(converted[0].weight.grad).all()
    assert converted[0].weight.grad.abs().sum() > 0


# --- batch size and shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["group", "layer", "layer(axes=channel)", "rms", "frozen"])
def test_training_at_batch_size_one_works_on_a_map_of_one_element(method: str) -> None:
    x = images(1, size=3)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), trained(nn.BatchNorm2d(32)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)
    converted = convert(model, method)
    y = converted(x)
    y.square().sum().backward()
    assert y.std() > 0.1
    assert converted[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["group", "layer"])
def test_training_on_one_sample_equals_training_on_it_inside_a_batch(method: str) -> None:
    converted = convert(net(), method).train()
    close(converted(images()[:1]), converted(images())[:1])


def test_batch_instance_refuses_one_value_per_channel_in_training() -> None:
    converted = convert(nn.Sequential(nn.BatchNorm2d(8)), "batch_instance").train()
    with pytest.raises(ShapeError, match=r"more than one value per channel in training, got \(1, 8, 1, 1\)"):
        converted(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize("inputs", [None, images()], ids=["shape unknown", "shape known"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "instance"])
def test_an_unbatched_image_is_an_error(method: str, inputs: Tensor | None) -> None:
    # nn.Conv2d takes (C, H, W); BatchNorm2d does not, and nothing that replaces it may misread it.
    converted = convert(net(), method, inputs=inputs).eval()
    with pytest.raises((ValueError, RuntimeError)):
        converted(images()[0])


@pytest.mark.parametrize("inputs", [None, images()], ids=["shape unknown", "shape known"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("instance", "group", "layer")])
def test_an_unbatched_image_as_high_as_it_has_channels_is_an_error(
    method: str, inputs: Tensor | None
) -> None:
    # (C, H, W) with H = C would pass for (N, C, L): BatchNorm2d refuses three dimensions, so must these.
    # nn.GroupNorm cannot tell, whoever builds it; the README says so.
    converted = convert(net(), method, inputs=inputs).eval()
    with pytest.raises((ValueError, RuntimeError)):
        converted(images(size=8)[0])


@pytest.mark.parametrize("inputs", [None, images()], ids=["shape unknown", "shape known"])
def test_an_unbatched_image_through_instance_norm_is_an_error_or_the_same_function(
    inputs: Tensor | None,
) -> None:
    # torch's InstanceNorm2d reads (C, H, W) as one sample, rightly.
    converted = convert(net(), "instance", inputs=inputs).eval()
    x = images(size=8)
    close(converted(x[0]), converted(x)[0])


@pytest.mark.parametrize("inputs", [None, torch.randn(8, 8, 5)], ids=["shape unknown", "shape known"])
def test_rows_through_instance_norm_are_not_read_as_one_sequence(inputs: Tensor | None) -> None:
    # (N, C) with N = C passes for an unbatched (C, L) in torch's InstanceNorm1d.
    converted = convert(nn.Sequential(nn.BatchNorm1d(8)), "instance", inputs=inputs).eval()
    with pytest.raises((ValueError, RuntimeError)):
        converted(torch.randn(8, 8))


@pytest.mark.parametrize("method", ["group(groups=8)", "instance"])
def test_one_element_per_group_is_refused_where_the_shape_is_known(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 6), nn.BatchNorm2d(8))
    with pytest.raises(RefusedError, match=r"1: .*output would be constant"):
        plan(model, method, inputs=images())


@pytest.mark.parametrize("method", ["group(groups=8)", "instance"])
def test_one_element_per_group_is_a_named_error_where_it_is_not(method: str) -> None:
    converted = convert(nn.Sequential(nn.Conv2d(3, 8, 6), nn.BatchNorm2d(8)), method)
    with pytest.raises(ShapeError, match=r"^1: .*one element per group"):
        converted(images())


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


# --- lazy, scripted, meta, synchronized -----------------------------------------------------------


def lazy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(eps=0.5), nn.ReLU())


# torch warns that lazy modules are young.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
class TestLazy:
    def test_it_is_refused_without_inputs(self) -> None:
        with pytest.raises(RefusedError, match=r"1: group refused: its number of channels is not known yet"):
            convert(lazy(), "group")

    @pytest.mark.parametrize("in_place", [True, False])
    def test_it_is_converted_with_inputs(self, in_place: bool) -> None:
        converted = convert(lazy(), "group", inputs=images(), in_place=in_place)
        assert (type(converted[1]), converted[1].num_channels, converted[1].eps) == (nn.GroupNorm, 8, 0.5)

    def test_a_copy_leaves_it_lazy(self) -> None:
        model = lazy()
        convert(model, "group", inputs=images())
        assert model[1].has_uninitialized_params()

    def test_finding_sites_leaves_it_lazy(self) -> None:
        model = lazy()
        (site,) = find_sites(model, images())
        assert model[1].has_uninitialized_params()
        assert model[0].has_uninitialized_params()
        assert (site.kind, site.channels, site.input_shapes) == ("lazy", None, ((4, 8, 4, 4),))
        assert find_sites(model)[0].kind == "lazy"

    def test_a_plan_made_with_inputs_knows_the_channels(self) -> None:
        # The refusal of a lazy layer says "give inputs=": that must be enough for plan() too.
        model = lazy()
        the_plan = plan(model, "group(groups=4)", inputs=images())
        assert str(the_plan["1"]) == "group(groups=4)"
        assert model[1].has_uninitialized_params()

    def test_after_a_forward_pass_it_is_a_batch_norm(self) -> None:
        model = lazy()
        model(images())
        assert find_sites(model)[0].kind == "batch"
        assert type(convert(model, "group")[1]) is nn.GroupNorm


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # TorchScript is deprecated; models in it are not gone.
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def test_a_scripted_model_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match=r"compiled TorchScript.*convert the nn\.Module it was made from"):
        convert(scripted(net()), "group")


def test_a_scripted_part_is_refused_by_name_and_can_be_left_out() -> None:
    model = nn.Sequential(net(), scripted(nn.Sequential(nn.BatchNorm2d(4))))
    assert [(site.path, site.kind) for site in find_sites(model, images())] == [
        ("0.1", "batch"),
        ("1.0", "scripted"),
    ]
    with pytest.raises(RefusedError, match=r"1\.0: group refused: it is compiled TorchScript"):
        convert(model, "group")
    converted = convert(model, {"0.*": "group"})
    assert converted(images()).shape == (4, 4, 6, 6)


@pytest.mark.parametrize(
    "method",
    [
        *METHODS,
        "switchable(bn_logit=40)",
        "sparse_switchable",
        "ghost",
        "ibn",
        "filter_response",
        "evonorm_s0",
        "group(weight_standardization=true)",
        "rms(whiten=true)",
        "weight",
        "spectral",
        "identity",
    ],
)
def test_a_model_on_the_meta_device_converts_to_the_same_shapes(method: str) -> None:
    with torch.device("meta"):
        model = net()
    converted = convert(model, method, inputs=images().to("meta"))
    real = convert(net(), method, inputs=images())
    assert find_sites(model)[0].trained is None
    assert {k: (v.shape, v.dtype) for k, v in converted.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in real.state_dict().items()
    }
    assert {v.device.type for v in converted.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("method", ["frozen", "batch_renorm", "batch_instance"])
def test_synchronized_batch_norm_is_converted(method: str) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net()).eval()
    assert find_sites(model)[0].kind == "sync"
    converted = convert(model, method)
    close(converted(images()), model(images()))
    if method != "frozen":
        assert converted[1].synchronized


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


class Reparameterizable(nn.Module):
    """Folds its BatchNorm when asked, as RepVGG does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def reparameterize(self) -> Tensor:
        return self.conv.weight * (self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt())


def test_a_method_that_reads_running_statistics_gets_a_note() -> None:
    model = nn.Sequential(Reparameterizable(), Reparameterizable())
    (note,) = plan(model, "group").notes
    assert note.startswith("Reparameterizable.reparameterize reads running statistics")
    assert explain(model, "group").notes == (note,)
    assert plan(model, "batch").notes == ()


class Attentive(nn.Module):
    """Uses a layer's γ outside the layer, and prepares it in a method that has run already."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.ones_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.abs().reshape(1, -1, 1, 1)


def test_a_forward_that_reads_a_sites_scale_gets_a_note() -> None:
    model = nn.Sequential(Attentive(), nn.ReLU())
    (note,) = plan(model, "group").notes
    assert note.startswith("Attentive.forward reads bn.weight, which holds other numbers")


# --- nothing to convert ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), nn.Identity()])
def test_a_model_without_batch_norm_is_a_plan_error(model: nn.Module) -> None:
    with pytest.raises(PlanError, match=f"{type(model).__name__} has no BatchNorm layer"):
        convert(model, "group")


def test_a_pattern_that_matches_nothing_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match=r"no site matches 'layer4\.\*'; paths look like '1'"):
        convert(net(), {"1": "group", "layer4.*": "layer"})


@pytest.mark.parametrize("model", [{"state": 1}, None, "resnet18"])
def test_what_is_no_module_is_a_model_error(model: object) -> None:
    for call in (lambda: convert(model, "group"), lambda: find_sites(model)):  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(model).__name__}"):
            call()


def test_inputs_that_the_model_cannot_take_are_a_model_error() -> None:
    with pytest.raises(ModelError, match="Sequential failed on the given inputs with RuntimeError"):
        plan(net(), "group", inputs=torch.randn(1, 5, 6, 6))


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
